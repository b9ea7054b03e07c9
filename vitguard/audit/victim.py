"""The victim: makes the update of a batch under a stack, as a client would."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from vitguard.attacks.base import InputAttack
from vitguard.audit.attempts import INTERRUPTED, outcome_of, seed_of
from vitguard.audit.corridor import corridor_of
from vitguard.audit.exposure import Exposure, Facts, Run, bound_of
from vitguard.audit.scale import Scale, decoys_for
from vitguard.audit.spreading import Job
from vitguard.core import LocalTraining, Loss, Normalization, Update
from vitguard.defenses.base import Defense
from vitguard.guard import Guard, protect
from vitguard.randomness import seeded
from vitguard.report.finding import Finding
from vitguard.threats.curious_server import Threat
from vitguard.vit import Anatomy

__all__ = ["Victim"]


@dataclass(frozen=True)
class Victim:
    """A client with images: every configuration of an audit trains on the same ones.

    Args:
        pixels: In [0, 1], shape (images, channels, height, width).
        size: Images behind one update.
    """

    model: nn.Module
    normalization: Normalization
    training: LocalTraining
    loss: Loss
    seed: int
    pixels: Tensor
    labels: Tensor
    names: tuple[str, ...]
    size: int

    @property
    def batches(self) -> range:
        """The updates that the images make."""
        return range(len(self.pixels) // self.size)

    def facts(self) -> list[Facts]:
        """Return what is known of each batch."""
        patch = Anatomy.of(self.model).patch_size
        decoys = decoys_for(self.pixels, self.seed)
        return [
            Facts(
                self.names[part],
                patch,
                self.pixels[part],
                self.labels[part],
                Scale.of(self.pixels[part], patch, decoys, self.seed),
            )
            for part in map(self._part, self.batches)
        ]

    def run(
        self, name: str, stack: Sequence[Defense], threat: Threat, facts: Sequence[Facts]
    ) -> Run:
        """Return the configuration of a stack under a threat; `facts` are those of the batches."""
        made = [partial(self.expose, stack, threat, i) for i in self.batches]
        steps = 1 if self.training.learning_rate is None else self.training.steps
        batches, corridor = (
            tuple(zip(facts, made, strict=True)),
            corridor_of(stack, steps, self.seed),
        )
        return Run(name, batches, bound_of(stack, steps), corridor=corridor)

    def expose(self, stack: Sequence[Defense], threat: Threat, index: int) -> Exposure:
        """Make the update of one batch under a stack; return what the adversary sees of it."""
        guard, update = self.made(stack, index, threat)
        view = threat.view(guard, update, self.normalization, loss=self.loss)
        return Exposure(view, guard.truth().get("shuffled"))

    def made(
        self, stack: Sequence[Defense], index: int = 0, threat: Threat | None = None
    ) -> tuple[Guard, Update]:
        """Make the update of one batch under a stack; the guard is as it was before the step.

        Args:
            threat: Who may write the weights that the victim trains on; None for nobody.
        """
        part = self._part(index)
        like = next(self.model.parameters())
        guard = self._guard(stack, index)
        if threat is not None and (written := threat.hand_out(guard)) is not None:
            guard.model.load_state_dict({**guard.model.state_dict(), **written})
        victim = seeded(seed_of(self.seed, index, "victim"), guard.model)  # its dropout
        with victim, guard.ungated(), guard.rewound():  # the adversary starts from the step before
            update = guard.update(
                self.normalization.apply(self.pixels[part]).to(like),
                self.labels[part].to(like.device),
                loss=self.loss,
                training=self.training,
            )
        return guard, update

    def on_input(self, name: str, stack: Sequence[Defense], attack: InputAttack) -> Job[Finding]:
        """Return the job of an attack on the input of the (defended) model in eval mode."""
        empty = Finding(name, attack.name, "inconclusive", settings=attack.settings())
        return Job(
            f"{name}: {attack.name}",
            partial(self._input_finding, empty, stack, attack),
            lambda reason: replace(empty, reason=reason),
        )

    def _input_finding(
        self,
        empty: Finding,
        stack: Sequence[Defense],
        attack: InputAttack,
        stop: threading.Event,
    ) -> Finding:
        if stop.is_set():
            return replace(empty, reason=INTERRUPTED)
        like = next(self.model.parameters())
        model = self._guard(stack, 0).model.eval()
        try:
            outcome = outcome_of(
                lambda: attack.evaluate(
                    model,
                    self.pixels.to(like),
                    self.labels.to(like.device),
                    normalization=self.normalization,
                    generator=torch.Generator().manual_seed(self.seed),
                )
            )
        except KeyboardInterrupt:
            stop.set()
            return replace(empty, reason=INTERRUPTED)
        result = outcome.result
        if result is None:
            stands = outcome.state in ("blocked", "not applicable")
            verdict = outcome.state if stands else "inconclusive"
            return replace(empty, verdict=verdict, reason=outcome.reason)
        hits = {"target reached": {**result.target_hits}} if result.target_hits else {}
        return replace(
            empty,
            reason="an attack on the input measures robustness, not what an update leaks",
            clean_accuracy=result.clean_accuracy,
            robust_accuracy={**result.robust_accuracy},
            details={**result.details, **hits},
            examples=result.examples,
            seconds=outcome.seconds,
        )

    def _guard(self, stack: Sequence[Defense], index: int) -> Guard:
        secret = torch.Generator().manual_seed(seed_of(self.seed, index, "defense"))
        return protect(copy.deepcopy(self.model).train(), stack, generator=secret)

    def _part(self, index: int) -> slice:
        return slice(index * self.size, (index + 1) * self.size)
