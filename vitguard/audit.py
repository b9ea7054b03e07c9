"""audit(): every attack beside an undefended control, and what it says."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitguard import data
from vitguard._attempts import attempt, decoys_for, seed_of
from vitguard._finding import Baseline, Control, Finding, ModelFacts
from vitguard._verdicts import Attempt, finding_of, rivals_of
from vitguard.attacks._base import Attack, InputAttack, InputResult
from vitguard.core import Loss, Normalization
from vitguard.defenses._base import Defense
from vitguard.errors import expected
from vitguard.guard import protect
from vitguard.metrics import baseline
from vitguard.models import check_finite, normalization_of
from vitguard.registry import families_not_run, parse_attacks, parse_stack, stack_name
from vitguard.report import AuditReport
from vitguard.threats import CuriousServer
from vitguard.vit import Anatomy

__all__ = ["LocalTraining", "audit", "facts_of"]

Stacks = Sequence[Defense] | str | Mapping[str, Sequence[Defense]]
_CONTROL = ""
Progress = Callable[[int, int, str], None]
_GLOBAL_GENERATOR = threading.Lock()
"""Held while the global generator is seeded and put back: it belongs to all threads."""


@dataclass(frozen=True)
class LocalTraining:
    """How a client makes its update: one gradient, or the difference of local steps.

    Args:
        learning_rate: None for one gradient; otherwise the rate of the steps behind a difference.
        steps: Full-batch local steps.
        optimizer: `sgd` or `adamw`.
    """

    learning_rate: float | None = None
    steps: int = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"

    def __str__(self) -> str:
        if self.learning_rate is None:
            return "one gradient"
        steps = "step" if self.steps == 1 else "steps"
        return (
            f"difference after {self.steps} {self.optimizer} {steps} at rate {self.learning_rate:g}"
        )


def audit(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    *,
    defenses: Stacks = (),
    attacks: str | Sequence[str | Attack | InputAttack] = "ladder",
    batch_size: int | None = None,
    normalization: Normalization | None = None,
    withhold: Sequence[str] = (),
    training: LocalTraining | None = None,
    loss: Loss = F.cross_entropy,
    names: Sequence[str] | None = None,
    model_name: str | None = None,
    weights: str = "as given",
    notes: Sequence[str] = (),
    seed: int = 0,
    workers: int = 1,
    progress: Progress | None = None,
) -> AuditReport:
    """Attack what a client would share, with and without defenses, and judge.

    The undefended control always runs. The model is copied; yours is not changed.

    Args:
        model: The bare model, before `protect`.
        batch: Pixels in [0, 1], shape (images, channels, height, width), and class indices.
        defenses: One stack, exactly what `protect` takes; or a spec such as
            `"positions:kind=frozen"`; or several stacks by name.
        attacks: Names, groups (`closed-form`, `matching`, `input`, `all`) or attacks. The default
            climbs every exact attack for at most a minute per batch. On a CPU a name means the
            attack's preset for a CPU, unless it sets iterations; `details` name the schedule.
        batch_size: Images behind one update; all of them by default. The images are cut into
            batches of this size.
        normalization: From pixels to model input; what the model's own configuration says by
            default.
        withhold: Selectors of parameters that are never sent (see `Anatomy.select`).
        training: How the update is made; one gradient by default.
        names, model_name, weights, notes: For the report.
        seed: Seeds the defenses' draws and the attacks; the same seed gives the same report.
        workers: Threads over configurations and batches.
        progress: Called with (done, total, what) as configurations finish.

    Raises:
        InputError: Pixels outside [0, 1], labels out of range, weights that are not finite, ...
        Incompatible: A stack that cannot work.
    """
    pixels, labels = _check_batch(model, batch, batch_size)
    size = batch_size or len(pixels)
    normalization = normalization or normalization_of(model)
    training = training or LocalTraining()
    chosen = parse_attacks(attacks, fast=next(model.parameters()).device.type == "cpu")
    names = tuple(names or (f"image {i}" for i in range(len(pixels))))
    stage = _Stage(model, normalization, training, loss, seed, pixels, labels, names, size)
    stacks: dict[str, Sequence[Defense]] = {"none": ()}
    stacks |= {k: s for k, s in _stacks(defenses).items() if s}
    for stack in stacks.values():
        protect(copy.deepcopy(model), stack)  # a stack that cannot work fails before the first run
    findings, levels = stage.findings(
        stacks, [a for a in chosen if isinstance(a, Attack)], tuple(withhold), workers, progress
    )
    for attack in (a for a in chosen if isinstance(a, InputAttack)):
        findings += [stage.input_finding(name, stack, attack) for name, stack in stacks.items()]
    return AuditReport(
        model=facts_of(model, stage.anatomy, model_name),
        images=names,
        batch_size=size,
        baseline=levels,
        findings=tuple(findings),
        weights=weights,
        update=str(training),
        seed=seed,
        threat={"adversary": "curious server", "withheld": list(withhold)},
        families_not_run=families_not_run(chosen),
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Stage:
    """What every run of one audit shares."""

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
    def anatomy(self) -> Anatomy:
        return Anatomy.of(self.model)

    def findings(
        self,
        stacks: Mapping[str, Sequence[Defense]],
        attacks: Sequence[Attack],
        withhold: tuple[str, ...],
        workers: int,
        progress: Progress | None,
    ) -> tuple[list[Finding], Baseline]:
        """Run all attacks on all stacks and batches, the control (nothing withheld) first."""
        scale = _Scale.of(self)
        batches = range(len(self.pixels) // self.size)
        # the undefended control, then each configuration under the threat
        runs: list[tuple[str, Sequence[Defense], tuple[str, ...]]] = [(_CONTROL, (), ())]
        runs += [(n, s, withhold) for n, s in stacks.items() if n != "none" or withhold]
        jobs = [(run, b) for b in batches for run in runs]
        done = 0

        def work(job: tuple[Any, int]) -> list[Attempt]:
            nonlocal done
            (name, stack, held), b = job
            attempts = self.attempts(stack, attacks, held, b, scale)
            done += 1
            if progress is not None:
                progress(done, len(jobs), "undefended control" if name == _CONTROL else name)
            return attempts

        with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
            results = list(pool.map(work, jobs))
        by_run: dict[str, list[list[Attempt]]] = {name: [] for name, _, _ in runs}
        for ((name, _, _), _), attempts in zip(jobs, results, strict=True):
            by_run[name].append(attempts)
        return self._judge(by_run, stacks, attacks), scale.level(batches, self.size)

    def _bounded(self, finding: Finding, stack: Sequence[Defense]) -> Finding:
        """Put what differential privacy guarantees of one update beside what the attack did."""
        if finding.identified is None or (rivals := rivals_of(finding)) < 1:
            return finding
        prior = 1 / (rivals + 1)
        steps = 1 if self.training.learning_rate is None else self.training.steps
        bounds = [b for d in stack if (b := d.reconstruction_bound(prior, steps)) is not None]
        if not bounds:
            return finding
        bound = {"reconstruction_bound": min(bounds), "reconstruction_prior": prior}
        return replace(finding, details={**finding.details, **bound})

    def _judge(
        self,
        by_run: Mapping[str, list[list[Attempt]]],
        stacks: Mapping[str, Sequence[Defense]],
        attacks: Sequence[Attack],
    ) -> list[Finding]:
        controls: dict[int, Finding] = {}
        findings = []
        for name in stacks:
            for i, attack in enumerate(attacks):
                tried = [
                    [batch[i] for batch in by_run[run]] for run in (_CONTROL, name) if run in by_run
                ]
                common = (attack.name, attack.settings())
                if i not in controls:
                    controls[i] = finding_of("none", *common, tried[0], None, ())
                of_control = replace(controls[i], control=None)
                if len(tried) == 1:
                    finding = finding_of("none", *common, tried[0], None, tried[0])
                    finding = replace(finding, control=Control(of_control.verdict, of_control.psnr))
                else:
                    finding = finding_of(name, *common, tried[1], of_control, tried[0])
                    finding = self._bounded(finding, stacks[name])
                findings.append(finding)
        return findings

    def attempts(
        self,
        stack: Sequence[Defense],
        attacks: Sequence[Attack],
        withhold: tuple[str, ...],
        index: int,
        scale: _Scale,
    ) -> list[Attempt]:
        """Make the victim's update of one batch under a stack and run every attack on it."""
        part = slice(index * self.size, (index + 1) * self.size)
        pixels, labels = self.pixels[part], self.labels[part]
        like = next(self.model.parameters())
        secret = torch.Generator().manual_seed(seed_of(self.seed, index, "defense"))
        guard = protect(copy.deepcopy(self.model).train(), stack, generator=secret)
        with _GLOBAL_GENERATOR, torch.random.fork_rng():
            torch.manual_seed(seed_of(self.seed, index, "victim"))  # dropout of the victim
            update = guard.update(
                self.normalization.apply(pixels).to(like),
                labels.to(like.device),
                loss=self.loss,
                learning_rate=self.training.learning_rate,
                local_steps=self.training.steps,
                optimizer=self.training.optimizer,
            )
        mask = guard.truth().get("shuffled")
        view = CuriousServer(withhold).view(guard, update, self.normalization, loss=self.loss)
        empty = Attempt(pixels, self.names[part], scale.baselines[index], mask=mask)
        return [
            attempt(
                attack,
                view,
                empty,
                labels=labels,
                patch_size=self.anatomy.patch_size,
                decoys=scale.decoys,
                seed=seed_of(self.seed, index, "attack"),
            )
            for attack in attacks
        ]

    def input_finding(self, name: str, stack: Sequence[Defense], attack: InputAttack) -> Finding:
        """Return the finding of an attack on the input of the (defended) model in eval mode."""
        guard = protect(copy.deepcopy(self.model), stack)
        generator = torch.Generator().manual_seed(self.seed)
        started = time.perf_counter()
        result = attack.evaluate(
            guard.model.eval(), self.pixels, self.labels,
            normalization=self.normalization, generator=generator,
        )  # fmt: skip
        return Finding(
            name,
            attack.name,
            "inconclusive",
            reason="an attack on the input measures robustness, not what an update leaks",
            settings=attack.settings(),
            clean_accuracy=result.clean_accuracy,
            robust_accuracy={**result.robust_accuracy},
            details={**result.details, **_hits(result)},
            examples=result.examples,
            seconds=time.perf_counter() - started,
        )


def _hits(result: InputResult) -> dict[str, Any]:
    return {"target reached": {**result.target_hits}} if result.target_hits else {}


@dataclass(frozen=True)
class _Scale:
    """What numbers are compared with: decoys, and the no-information baseline of each batch."""

    decoys: Tensor
    baselines: tuple[Any, ...]

    @staticmethod
    def of(stage: _Stage) -> _Scale:
        pixels, patch = stage.pixels.cpu(), stage.anatomy.patch_size
        decoys = decoys_for(pixels, stage.seed)
        mean = data.mean_image(decoys)
        cut = pixels.split(stage.size)
        return _Scale(decoys, tuple(baseline(part, patch, mean_image=mean) for part in cut))

    def level(self, batches: range, size: int) -> Baseline:
        used = [self.baselines[b] for b in batches]
        return Baseline(
            psnr=max(float(b.psnr.max()) for b in used),
            patch_psnr=max(float(b.patch_psnr.max()) for b in used),
        )


def _stacks(defenses: Stacks) -> dict[str, Sequence[Defense]]:
    if isinstance(defenses, str):
        defenses = parse_stack(defenses)
    if isinstance(defenses, Mapping):
        if defenses.get("none") or _CONTROL in defenses:
            raise expected("stacks with names of their own", "'none' or '', the undefended control")
        return {name: list(stack) for name, stack in defenses.items()}
    return {stack_name(defenses): list(defenses)}


def facts_of(model: nn.Module, anatomy: Anatomy, name: str | None) -> ModelFacts:
    """Return what a report says of a model."""
    count = sum(p.numel() for p in model.parameters())
    return ModelFacts(name or type(model).__name__, count, anatomy.patches, anatomy.width)


def _check_batch(
    model: nn.Module, batch: tuple[Tensor, Tensor], batch_size: int | None
) -> tuple[Tensor, Tensor]:
    anatomy = Anatomy.of(model)
    pixels, labels = batch
    shape = (anatomy.channels, *anatomy.image_size)
    if pixels.dim() != 4 or tuple(pixels.shape[1:]) != shape or not len(pixels):
        raise expected(
            f"images of shape (images, {', '.join(map(str, shape))})", tuple(pixels.shape)
        )
    if not bool(pixels.isfinite().all()):
        raise expected("finite images", "NaN or infinity")
    if float(pixels.min()) < 0 or float(pixels.max()) > 1:
        raise expected(
            "pixels in [0, 1]",
            f"values from {float(pixels.min()):.3g} to {float(pixels.max()):.3g}",
            "Give pixels and normalization=Normalization(mean, std).",
        )
    labels = data.check_labels(labels, anatomy.classes)
    if len(labels) != len(pixels):
        raise expected(f"{len(pixels)} labels", len(labels))
    if batch_size is not None and (batch_size < 1 or len(pixels) % batch_size):
        raise expected(
            f"a batch size that divides the {len(pixels)} images", batch_size,
            "Change --batch-size or --num-images.",
        )  # fmt: skip
    check_finite(model)
    return pixels.float(), labels
