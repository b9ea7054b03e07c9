"""Time and memory of a private step beside a plain one and Opacus, interleaved in one run.

    python benchmarks/privacy.py [--rounds 8] [--threads 1] [--setting NAME ...]

Settings: 32, 224 (the default two), 224-deep (12 blocks), and 32-average and 224-average, which
pool over all tokens: a model that reads its class token alone gives most tokens of its last block
no gradient, which saves work.

Prints CPU time of one step (median over rounds), its ratio to plain SGD, and the peak of live
tensor memory. CPU time of this process is what a shared machine can tell; on an idle one it goes
with wall time.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from vitguard.defenses.base import Draws
from vitguard.defenses.privacy import DifferentialPrivacy

Step = Callable[[], None]

SETTINGS = {
    "32": (
        {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4,
         "mlp_ratio": 2}, 64,
    ),
    "224": ({"depth": 2}, 8),
    "224-deep": ({"depth": 12}, 8),
    "32-average": (
        {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4,
         "mlp_ratio": 2, "global_pool": "avg"}, 64,
    ),
    "224-average": ({"depth": 2, "global_pool": "avg"}, 8),
}  # fmt: skip


def build(setting: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a model and one batch."""
    torch.manual_seed(0)
    sizes, batch = SETTINGS[setting]
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes).train()
    size = sizes.get("img_size", 224)
    return model, torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,))


def plain(setting: str) -> Step:
    model, images, labels = build(setting)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def vitguard(setting: str, engine: str = "bookkeeping") -> Step:
    """Return a step of the prepared training loop, on a fixed batch for fairness."""
    model, images, labels = build(setting)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = DataLoader(TensorDataset(images, labels), batch_size=len(labels))
    defense = DifferentialPrivacy(noise=1.0, delta=1e-3, engine=engine)  # type: ignore[arg-type]
    private, poisson, _ = defense.prepare(model, optimizer, loader, Draws())

    def step() -> None:
        poisson.training.announce(len(labels), len(labels))
        F.cross_entropy(model(images), labels).backward()
        private.step()
        private.zero_grad()

    return step


def opacus(setting: str, mode: str) -> Step:
    """Return a step of Opacus as it is: `hooks` or `ghost`."""
    from opacus import PrivacyEngine

    model, images, labels = build(setting)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = DataLoader(TensorDataset(images, labels), batch_size=len(labels))
    criterion = nn.CrossEntropyLoss()
    settings = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "poisson_sampling": False}
    engine = PrivacyEngine()
    if mode == "ghost":
        model, optimizer, criterion, _ = engine.make_private(
            module=model, optimizer=optimizer, data_loader=loader, criterion=criterion,
            grad_sample_mode="ghost", **settings,
        )  # fmt: skip
    else:
        model, optimizer, _ = engine.make_private(
            module=model, optimizer=optimizer, data_loader=loader, **settings
        )

    def step() -> None:
        criterion(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


METHODS: dict[str, Callable[[str], Step]] = {
    "SGD": plain,
    "vitguard": vitguard,
    "vitguard, Opacus engine": lambda s: vitguard(s, "opacus"),
    "Opacus hooks": lambda s: opacus(s, "hooks"),
    "Opacus ghost": lambda s: opacus(s, "ghost"),
}


def peak_memory(step: Step) -> float:
    """Return the highest sum of tensor memory that a step allocates, in MiB."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    events = record.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = highest = 0
    for _, change in changes:
        now += change
        highest = max(highest, now)
    return highest / 2**20


def measure(setting: str, rounds: int) -> None:
    steps = {name: make(setting) for name, make in METHODS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            step()  # the first after another method pays for its memory
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
    base = statistics.median(seconds["SGD"])
    memory = {name: peak_memory(step) for name, step in steps.items()}
    print(f"\n{setting} px: {SETTINGS[setting]}")
    for name, values in seconds.items():
        middle = statistics.median(values)
        paired = statistics.median(v / s for v, s in zip(values, seconds["SGD"], strict=True))
        share = memory[name] / memory["SGD"]
        print(
            f"  {name:24} {1e3 * middle:8.1f} ms  {middle / base:5.2f} x  (paired {paired:4.2f})"
            f"  {memory[name]:8.1f} MiB  {share:5.2f} x"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--setting", choices=SETTINGS, action="append")
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(chosen.threads)
    for setting in chosen.setting or ["32", "224"]:
        measure(setting, chosen.rounds)


if __name__ == "__main__":
    main()
