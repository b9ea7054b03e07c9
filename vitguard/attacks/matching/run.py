"""One run of a matching attack: what was seen, the restarts, the loop, and the guess."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from vitguard.attacks.labels import pair_labels, try_labels
from vitguard.attacks.leaked_mask import leaked_mask
from vitguard.attacks.matching.checkpoint import load_run, save_run
from vitguard.attacks.matching.distances import attach
from vitguard.attacks.matching.priors import Prior, Scene
from vitguard.attacks.matching.progress import Progress
from vitguard.attacks.matching.restart import EVALUATIONS, Restart
from vitguard.attacks.matching.settings import MatchingSettings
from vitguard.attacks.matching.slope import DifferenceSlope
from vitguard.attacks.matching.subspace import Subspace, row_space
from vitguard.core import Guess, Update, View
from vitguard.errors import Blocked, NotApplicable, expected
from vitguard.files import check_writable
from vitguard.vit import Anatomy, math_attention

__all__ = ["Run"]

_DIFFERENCE, _EXACT = 2.4, 3.5  # cost of an evaluation in passes there and back
_LEAST = 5  # evaluations, whatever the budget
_SAVE_EVERY = 30.0  # seconds
_SURE = 9.0  # odds of an inferred label over all others, where labels are optimised from there


class Run:
    """One run: what was seen, the restarts, and how to measure."""

    def __init__(self, attack: MatchingSettings, view: View, generator: torch.Generator) -> None:
        self.attack, self.view = attack, view
        self.start = _checked(attack.start, view)
        self.anatomy = Anatomy.of(view.model)
        self.recipe = attack.recipe(view, self.anatomy)
        self.like = next(view.model.parameters())
        self.seen = self._readable()
        self.seed = int(torch.randint(2**62, (), generator=generator))
        self.label_rule, labels = self._labels(generator)
        self.shuffled, self.mask_rule = leaked_mask(view, self.anatomy, self.start, generator)
        self.known = {} if self.shuffled is None else {"shuffled": self.shuffled}
        self.subspace = Subspace(self.anatomy, self._space(), attack.spectrum, self._proved())
        shape = (1, *view.image_shape)
        box = [view.normalization.apply(torch.full(shape, v)).to(self.like) for v in (0.0, 1.0)]
        self.restarts = [self._restart(r, labels, (box[0], box[1])) for r in range(attack.restarts)]
        self.begun = self._begun()
        self.difference = self._difference_slope()
        self.planned = self._plan()
        self.done = 0
        self.interrupted = self.out_of_time = False

    def _readable(self) -> dict[str, Tensor]:
        update = self._comparable(self.view.update)
        wanted = self.attack.parameters
        chosen = self.anatomy.select(wanted, [*update.tensors, *update.sealed])
        names = [n for n in chosen if update.can_read(n)]
        if not names:
            reason = update.sealed[chosen[0]] if chosen else "it is not in the update"
            raise Blocked(f"every {wanted} tensor" if wanted != "all" else "the update", reason)
        seen = {name: update.tensors[name].detach().to(self.like) for name in names}
        if not all(bool(tensor.isfinite().all()) for tensor in seen.values()):
            raise NotApplicable("the update is not finite")
        return seen

    def _comparable(self, update: Update) -> Update:
        """Scale a difference of SGD steps to gradients, seen and dummy alike."""
        try:
            return update.as_gradient(self.view.model, steps=True)
        except NotApplicable:
            return update

    def _labels(self, generator: torch.Generator) -> tuple[str, Tensor | None]:
        if self.recipe.joint_labels == "random":
            return "optimised with the images", None
        given = None if self.start is None else self.start.labels
        if self.start is not None and given is not None:
            paired = pair_labels(self.view, self.start.images, given)
            return "from the start", paired.to(self.like.device)
        labels = try_labels(self._mean_gradient(), generator)
        if labels is None:
            return "optimised with the images: they cannot be inferred", None
        rule = "optimised from inferred ones" if self.recipe.joint_labels else "inferred"
        return rule, labels.to(self.like.device)

    def _difference_slope(self) -> DifferenceSlope | None:
        wanted = self.attack.derivative
        if wanted == "auto":
            wanted = "difference" if self.recipe.optimizer == "adam" else "exact"
        full = self.like.dtype in (torch.float32, torch.float64)
        if wanted == "exact" or not full or self.view.objective is None:
            return None
        return DifferenceSlope(self.view.objective, self.recipe.distance, self.seen, self.known)

    def _plan(self) -> int:
        """Return how many iterations the budget lasts for; L-BFGS may get shorter ones too."""
        attack, update = self.attack, self.view.update
        if self.subspace.settled:
            return 1  # for the distance
        if attack.budget is None:
            return attack.iterations
        weights = sum(p.numel() for p in self.view.model.parameters())
        there_and_back = 6 * weights * self.anatomy.tokens * update.local_steps
        each = (_DIFFERENCE if self.difference else _EXACT) * there_and_back * attack.restarts
        evaluations = int(attack.budget / each)
        if self.recipe.optimizer == "adam":
            return min(attack.iterations, max(_LEAST, evaluations))
        inner = min(EVALUATIONS, max(_LEAST, evaluations))
        for restart in self.restarts:
            restart.shorten(inner)
        return min(attack.iterations, max(1, evaluations // inner))

    def _mean_gradient(self) -> View:
        """The seen update as the mean gradient of its local steps, where it determines one."""
        update, steps = self._comparable(self.view.update), self.view.update.local_steps
        tensors = {k: t / steps for k, t in update.tensors.items()}
        return replace(self.view, update=replace(update, tensors=tensors))

    def _space(self) -> Any:
        if not self.attack.subspace:
            return None
        given = None if self.start is None else self.start.space
        return given if given is not None else row_space(self.view, self.anatomy)

    def _proved(self) -> tuple[Tensor, Tensor] | None:
        """Model-input images of the start and its verified patches, which are not searched.

        Of a batch only those of the first `told_apart` images: of others, whose patch one is is a
        guess.
        """
        start = self.start
        if start is None or start.verified is None or not self.attack.subspace:
            return None
        if len(start.images) != self.view.update.batch_size or self.view.traits.shuffle is not None:
            return None
        images = self.view.normalization.apply(start.images.to(self.like))
        proved = start.verified.to(images.device, copy=True)
        if len(images) > 1:
            proved[int(start.details.get("told_apart", 0)) :] = False
        return (images, proved) if bool(proved.any()) else None

    def _restart(self, index: int, labels: Tensor | None, box: tuple[Tensor, Tensor]) -> Restart:
        noise = self._generator(-1, index)
        batch, shape = self.view.update.batch_size, self.view.image_shape
        images = torch.randn((batch, *shape), generator=noise).to(self.like) * self.recipe.spread
        start = self.start if self.start is not None and len(self.start.images) else None
        if start is not None:
            base = self.view.normalization.apply(start.images.to(self.like)).clamp(*box)
            exact = index == 0 and len(base) == batch
            # One image for a whole batch, or a further restart: leave the symmetric point.
            images = base.expand_as(images) + (0 if exact else 0.1 * images)
        elif self.subspace.spectrum:
            images = 0.3 * images  # whitened noise: about the contrast of a photo
        scores = None
        if labels is None:
            scores = torch.randn((batch, self.view.classes), generator=noise).to(self.like)
        elif self.recipe.joint_labels:
            scores = one_hot(labels, self.view.classes).to(self.like)
            scores, labels = scores * math.log(_SURE * max(self.view.classes - 1, 1)), None
        free = images if start is None else self.subspace.encode(images)
        return Restart(self.recipe, self.subspace, free, labels, scores, box)

    def _begun(self) -> tuple[Tensor, Tensor] | None:
        """Free variables and labels of a start that has an image for each of the batch."""
        if self.start is None or len(self.start.images) != self.view.update.batch_size:
            return None
        first = self.restarts[0]
        return first.free.detach().clone(), _classes(first.current_labels())

    def _generator(self, iteration: int, restart: int) -> torch.Generator:
        """One generator for each step, so that a resumed run draws what an unbroken one does."""
        mixed = (self.seed + 1_000_003 * (iteration + 1) + 7_919 * restart) % 2**63
        return torch.Generator().manual_seed(mixed)

    def go(self) -> Guess:
        attack, began = self.attack, time.thread_time()
        identity = self._identity()
        if attack.resume is not None:
            check_writable(attack.resume)
            self.done = load_run(attack.resume, identity, self.restarts)
        saved = time.monotonic()
        try:
            while self.done < self.planned and any(r.alive for r in self.restarts):
                self._iterate()
                self.done += 1
                spent, now = time.thread_time() - began, time.monotonic()
                if attack.watch is not None:
                    attack.watch(self._progress(spent))
                if attack.seconds is not None and spent >= attack.seconds:
                    self.out_of_time = self.done < self.planned
                    break
                if attack.resume is not None and now - saved > _SAVE_EVERY:
                    saved = now
                    save_run(attack.resume, identity, self.restarts, self.done)
        except KeyboardInterrupt:
            self.interrupted = True
        if attack.resume is not None and not self.interrupted:
            save_run(attack.resume, identity, self.restarts, self.done)
        return self._guess()

    def _iterate(self) -> None:
        share = self.done / self.planned
        ensemble = torch.stack([r.images() for r in self.restarts])
        for index, restart in enumerate(self.restarts):
            if not restart.alive:
                continue
            scene = Scene(self.anatomy, self.view.normalization, ensemble, index)

            def prior(term: Prior, images: Tensor, scene: Scene = scene) -> Tensor:
                return term(images, scene)

            seed = self._generator(self.done, index).initial_seed()

            def measure(images: Tensor, labels: Tensor, seed: int = seed) -> Tensor:
                # Line searches call this several times: each must see the same draws.
                return self._measure(images, labels, seed)

            with nullcontext() if self.difference else math_attention():
                restart.step(share, measure, prior, self._generator(self.done, index))

    def _measure(self, images: Tensor, labels: Tensor, seed: int) -> Tensor:
        if self.difference is not None:
            return self.difference(images, labels, seed)
        generator = torch.Generator().manual_seed(seed)
        made = self.view.simulate(images, labels, generator, **self.known)
        dummy = self._comparable(made).tensors
        named = {k: dummy[k] for k in self.seen if k in dummy and dummy[k].requires_grad}
        if not named:
            raise NotApplicable("the simulated update depends on no image")
        return attach(self.recipe.distance, named, self.seen)

    def _distance(self, restart: Restart, free: Tensor, draws: int = 0) -> float:
        """The distance at `free`, with draws that are the same for all candidates."""
        labels = restart.best_labels if restart.label_scores is not None else restart.labels
        assert labels is not None
        images = self.subspace.decode(free).requires_grad_()
        with math_attention():
            value = self._measure(images, labels, self._generator(-2 - draws, 0).initial_seed())
        return float(value.detach())

    def _drawn(self) -> bool:
        """Whether the defense's draws move the distance: then one good value is luck."""
        if not self.view.settings or self.shuffled is not None:
            return False
        if self.view.random():  # two distances differ anyhow
            return self.view.traits.shuffle is not None
        restart = self.restarts[0]
        return self._distance(restart, restart.free.detach(), 0) != self._distance(
            restart, restart.free.detach(), 1
        )

    def _candidates(self) -> tuple[list[tuple[Tensor, Tensor]], list[float]]:
        """Images and labels of each restart, the start's last, and their distances.

        The start stays in the race: priors and coarse steps lead away from one that is nearly
        right, and its distance tells. Defenses that draw do so alike for all.
        """
        drawn = self._drawn()
        runners = list(self.restarts)
        held = [(r.free.detach() if drawn else r.best, _classes(r.labels_found())) for r in runners]
        distances = [r.best_distance for r in runners]
        if self.begun is not None:
            first = runners[0].first_distance
            runners.append(runners[0])
            held.append(self.begun)
            distances.append(math.inf if first is None else first)
        if drawn or self.view.random():
            distances = [self._distance(r, x) for r, (x, _) in zip(runners, held, strict=True)]
        return held, distances

    def _guess(self) -> Guess:
        if not self.interrupted and all(r.best_distance == math.inf for r in self.restarts):
            raise NotApplicable("the distance to the update was never a finite number")
        candidates, distances = self._candidates()
        chosen = min(range(len(distances)), key=distances.__getitem__)
        free, labels = candidates[chosen]
        begun = [r.first_distance for r in self.restarts if r.first_distance is not None]
        details: dict[str, Any] = {
            "iterations": self.done,
            "schedule": self._schedule(),
            "distance": distances[chosen] if math.isfinite(distances[chosen]) else None,
            "distance at the start": min(begun) if begun else None,
            "labels": self.label_rule,
            "derivative": "exact" if self.difference is None else "difference",
            "tensors matched": len(self.seen),
        }
        if self.subspace.directions is not None:
            details["free directions per patch"] = self.subspace.directions
        if self.view.settings:
            details["simulated"] = sorted(self.view.settings)
        if self.mask_rule:
            details["shuffle mask"] = self.mask_rule
        if self.recipe.dropped:
            details["dropped"] = list(self.recipe.dropped)
        if chosen == len(self.restarts):
            details["kept"] = "the start: nothing that was found has a nearer update"
        for flag in ("interrupted", "out_of_time"):
            if getattr(self, flag):
                details[flag.replace("_", " ")] = True
        if self.done < self.planned:  # a cut attack has not been resisted
            details["unfinished"] = [f"iteration {self.planned:,}"]
        return Guess(
            images=self._pixels(self.subspace.decode(free)),
            labels=labels.cpu(),
            shuffled=self.shuffled,
            details=details,
        )

    def _schedule(self) -> str:
        """Say plainly how long the run was beside the paper's."""
        paper = type(self.attack)().iterations
        if self.done < self.planned:
            why = "a value that is not finite"
            why = "an interrupt" if self.interrupted else "time" if self.out_of_time else why
            return f"cut short by {why}: {self.done:,} of {self.planned:,} iterations"
        if self.subspace.settled:
            return "one iteration: the start proved every patch, so nothing is left to search"
        if self.planned >= paper:
            return f"the full {paper:,} iterations"
        cause = "" if self.planned == self.attack.iterations else " to fit the budget of a CPU"
        return f"shortened{cause}: {self.planned:,} iterations where the full run has {paper:,}"

    def _pixels(self, images: Tensor) -> Tensor:
        return self.view.normalization.invert(images).clamp(0, 1).detach().cpu()

    def _progress(self, seconds: float) -> Progress:
        leader = min(self.restarts, key=lambda r: r.best_value)
        rate = self.recipe.rate_at((self.done - 1) / self.planned)
        return Progress(
            attack=self.attack.name,
            iteration=self.done,
            iterations=self.planned,
            terms={**leader.terms, "rate": rate},
            estimate=lambda: self._pixels(leader.images()),
            seconds=seconds,
            settings=self.attack.settings(),
        )

    def _identity(self) -> dict[str, Any]:
        """What a saved run must have in common with this one."""
        settings = {
            k: repr(v) for k, v in self.attack.settings().items() if k not in ("seconds", "resume")
        }
        tools = ("network",) if getattr(self.attack, "network", None) is not None else ()
        return {
            "attack": self.attack.name,
            "seed": self.seed,
            "update": _norm(*self.seen.values()),
            "start": None if self.start is None else _norm(self.start.images),
            "tools": list(tools),
            **settings,
        }


def _classes(labels: Tensor) -> Tensor:
    """Return class indices of labels that may be probabilities."""
    return labels.argmax(-1) if labels.is_floating_point() else labels


def _norm(*tensors: Tensor) -> float:
    return float(torch.stack([t.detach().double().norm() for t in tensors]).norm())


def _checked(start: Guess | None, view: View) -> Guess | None:
    """Return a start that this view can begin from; one without images gives its labels only.

    Raises:
        InputError: Images of another shape or number, or not finite.
    """
    if start is None:
        return None
    batch, shape = view.update.batch_size, view.image_shape
    if len(start.images) not in (0, 1, batch) or tuple(start.images.shape[1:]) != shape:
        raise expected(
            f"a start of 1 or {batch} images of shape {shape}", tuple(start.images.shape)
        )
    if not bool(start.images.isfinite().all()):
        raise expected("a start of finite images", "NaN or infinity")
    labels, classes = start.labels, range(view.classes)
    if labels is None or (len(labels) == batch and all(int(k) in classes for k in labels)):
        return start
    return replace(start, labels=None)
