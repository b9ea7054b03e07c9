"""Lower bounds on epsilon from canaries, on every path by which a private gradient leaves.

    python benchmarks/canaries.py [--trials 5000] [--epsilon 8] [--paths update loop ...]
    python benchmarks/canaries.py --trials 500 --faults

Each trial releases with or without one record whose gradient is longer than the clip. The adversary
knows everything else: model, the other record, the canary's gradient. No bound may exceed what is
claimed. `--faults` plants three faults on each path (noise halved, clip doubled, noise used twice);
each must be found, as a bound above the claim.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import timm
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from vitguard.core import Batch, Update
from vitguard.defenses.privacy import ClientPrivacy, DifferentialPrivacy
from vitguard.defenses.privacy.accounting import gaussian_epsilon, noise_for
from vitguard.defenses.privacy.verification import CanaryBound, canary_audit
from vitguard.draws import Draws
from vitguard.guard import Guard, protect

CLIP = 1e-2  # below the norm of any gradient here, so that every one is clipped
DELTA = 1e-5
SIZES = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1, "mlp_ratio": 1}

Release = Callable[[bool], float]


@dataclass(frozen=True)
class Scene:
    """A model, two records (the second is the canary), and what the adversary knows of them.

    Args:
        noise, clip: What the mechanism is built with; its claim may be another.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    others: Tensor
    canary: Tensor
    noise: float
    clip: float

    @staticmethod
    def of(noise: float, clip: float = CLIP) -> Scene:
        """Return the scene; the canary's gradient is clipped to `CLIP` whatever `clip` is."""
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", num_classes=2, **SIZES).train()
        images, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
        guard = protect(copy.deepcopy(model), [DifferentialPrivacy(noise=1.0, clip=clip)])
        defense: Any = guard.defenses[0]
        with guard.rehearsing():
            others, canary = (
                flat(defense.clipped_sum(guard.model, F.cross_entropy, Batch(images[i], labels[i])))
                for i in (slice(0, 1), slice(1, 2))
            )
        return Scene(model, images, labels, others, canary * (CLIP / clip), noise, clip)

    def score(self, total: Tensor, others: bool = True) -> float:
        """Return the projection of a noisy sum on the canary, 1 for its whole gradient."""
        known = self.others if others else torch.zeros_like(total)
        return float((total - known) @ self.canary / (self.canary @ self.canary))

    def private(self, **settings: Any) -> DifferentialPrivacy:
        """Return the defense under audit."""
        return DifferentialPrivacy(noise=self.noise, clip=self.clip, delta=DELTA, **settings)

    def updated(self, guard: Guard, included: bool) -> float:
        """Return the score of one `guard.update`."""
        size = 2 if included else 1
        update = guard.update(self.images[:size], self.labels[:size])
        return self.score(flat(update.tensors) * size)


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return all tensors as one vector, float64, in the order of their names."""
    return torch.cat([tensors[k].detach().double().flatten() for k in sorted(tensors)])


def update(scene: Scene) -> Release:
    """`guard.update` of one guard."""
    guard = protect(copy.deepcopy(scene.model), [scene.private()])
    return lambda included: scene.updated(guard, included)


def loop(scene: Scene, **settings: Any) -> Release:
    """Steps of the loop that `guard.prepare` makes private, every record in every batch."""
    steps = {included: _steps(scene, included, **settings) for included in (False, True)}
    return lambda included: next(steps[included])


def _steps(scene: Scene, included: bool, **settings: Any) -> Iterator[float]:
    size = 2 if included else 1
    model = copy.deepcopy(scene.model)
    guard = protect(model, [scene.private(**settings)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # the same weights in every trial
    data = TensorDataset(scene.images[:size], scene.labels[:size])
    optimizer, loader = guard.prepare(optimizer, DataLoader(data, batch_size=size))
    while True:
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            if loader.ends_step:
                released = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
                yield scene.score(flat(released) * size)


def pieces(scene: Scene) -> Release:
    """The loop with `physical_batch=1`: two records come one at a time."""
    return loop(scene, physical_batch=1)


def client(scene: Scene) -> Release:
    """`ClientPrivacy` on a finished update: a client that is there, or sends nothing of its own."""
    guard = protect(
        copy.deepcopy(scene.model), [ClientPrivacy(noise=scene.noise, clip=scene.clip, delta=DELTA)]
    )
    shapes = {k: p.shape for k, p in sorted(guard.public_model().named_parameters())}
    parts = (10 * scene.canary).float().split([s.numel() for s in shapes.values()])
    own = {k: t.reshape(s) for (k, s), t in zip(shapes.items(), parts, strict=True)}

    def release(included: bool) -> float:
        tensors = {k: t if included else torch.zeros_like(t) for k, t in own.items()}
        facts: dict[str, Any] = {"kind": "difference", "learning_rate": 0.1, "local_steps": 1}
        sent = guard.seal(Update(tensors=tensors, batch_size=1, **facts))
        return scene.score(flat(sent.tensors), others=False)

    return release


def resumed(scene: Scene) -> Release:
    """`guard.update` right after `load_state_dict` of one and the same checkpoint."""
    first = protect(copy.deepcopy(scene.model), [scene.private()])
    first.update(scene.images, scene.labels)
    state = copy.deepcopy(first.state_dict())

    def release(included: bool) -> float:
        guard = protect(copy.deepcopy(scene.model), [scene.private()])
        guard.load_state_dict(copy.deepcopy(state))
        return scene.updated(guard, included)

    return release


def forked(scene: Scene) -> Release:
    """`guard.update` in forked children, twenty releases in each, two children in turn.

    What two siblings inherit is the same, so the pairs of `canary_audit` come from siblings.
    """
    guard = protect(copy.deepcopy(scene.model), [scene.private()])
    scene.updated(guard, True)  # what is made at the first use is there before the forks
    ready: list[tuple[bool, float]] = []

    def release(included: bool) -> float:
        if not ready:
            turns = [[bool((i + first) % 2) for i in range(20)] for first in (0, 1)]
            siblings = [in_a_fork(lambda t=t: [scene.updated(guard, i) for i in t]) for t in turns]
            for pair in zip(*map(zip, turns, siblings), strict=True):
                ready.extend(pair)
        (expected, score) = ready.pop(0)
        if expected != included:
            raise ValueError("Expected releases in the order of canary_audit.")
        return score

    return release


def in_a_fork(act: Callable[[], list[float]]) -> tuple[float, ...]:
    """Return what `act` gives in a child process."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.write(write, array("d", act()).tobytes())
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        scores = array("d", pipe.read())
    os.waitpid(child, 0)
    return tuple(scores)


PATHS: dict[str, Callable[[Scene], Release]] = {
    "update": update,
    "loop": loop,
    "physical_batch": pieces,
    "client": client,
    "resumed": resumed,
    "forked": forked,
}


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute for a moment."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _half_noised(draws: Draws, total: Tensor, deviation: float) -> Tensor:
    return _NOISED(draws, total, deviation / 2)


def _same_stream(draws: Draws) -> Any:
    return Cipher(algorithms.AES(bytes(32)), modes.CTR(bytes(16))).encryptor()


_NOISED = Draws.noised
FAULTS: dict[str, Callable[[], Any]] = {
    "none": nullcontext,
    "noise halved": lambda: patched(Draws, "noised", _half_noised),
    "clip doubled": nullcontext,  # built so: see `audit`
    "noise reused": lambda: patched(Draws, "_stream", _same_stream),
}


def audit(
    path: str, noise: float, trials: int, fault: str = "none", confidence: float = 0.95
) -> CanaryBound:
    """Audit one path against the claim of noise multiplier `noise`."""
    twice = 2.0 if fault == "clip doubled" else 1.0  # clips at twice CLIP, with the noise of CLIP
    with FAULTS[fault]():
        release = PATHS[path](Scene.of(noise / twice, CLIP * twice))
        return canary_audit(release, trials=trials, delta=DELTA, confidence=confidence)


def main() -> None:
    """Audit every path and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=5000, help="releases on each side")
    parser.add_argument("--epsilon", type=float, default=8.0, help="the claim of one release")
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS))
    parser.add_argument("--faults", action="store_true", help="plant the three faults instead")
    options = parser.parse_args()
    noise = noise_for(options.epsilon, DELTA, 1.0, 1)
    claim = gaussian_epsilon(1 / noise, DELTA)
    print(f"claim: epsilon {claim:.3f} at delta {DELTA:g}, mu {1 / noise:.3f} (noise {noise:.4f})")
    print(f"{options.trials} trials a side, confidence {options.confidence:g}")
    print(f"{'path':16}{'fault':16}{'thresholds':>11}{'gaussian':>9}{'mu':>7}{'ratio':>7}{'s':>7}")
    for path in options.paths:
        for fault in [f for f in FAULTS if (f != "none") == options.faults]:
            started = time.perf_counter()
            bound = audit(path, noise, options.trials, fault, options.confidence)
            seconds = time.perf_counter() - started
            print(
                f"{path:16}{fault:16}{bound.thresholds:11.2f}{bound.gaussian:9.2f}{bound.mu:7.3f}"
                f"{bound.ratio:7.3f}{seconds:7.0f}  {'ABOVE' if bound.epsilon > claim else ''}",
                flush=True,
            )


if __name__ == "__main__":
    main()
