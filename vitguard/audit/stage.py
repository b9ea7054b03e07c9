"""What an audit runs: the victim's update under each stack, and every attack on it."""

from __future__ import annotations

import copy
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitguard import data
from vitguard.attacks.base import Attack, InputAttack, InputResult
from vitguard.audit.attempts import attempt, covered, decoys_for, seed_of
from vitguard.audit.verdicts import Attempt, finding_of, rivals_of
from vitguard.core import LocalTraining, Loss, Normalization, View
from vitguard.defenses.base import Defense
from vitguard.errors import Blocked, NotApplicable, Unprotected, expected
from vitguard.files import check_writable
from vitguard.guard import protect
from vitguard.metrics import baseline
from vitguard.randomness import seeded
from vitguard.report.finding import Baseline, Control, Finding
from vitguard.threats.curious_server import Threat
from vitguard.vit import Anatomy

__all__ = ["CONTROL", "INTERRUPTED", "Progress", "Stage"]

CONTROL = ""
"""Name of the undefended control among the runs."""
INTERRUPTED = "interrupted before its end"
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Stage:
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
        threat: Threat,
        workers: int,
        progress: Progress | None,
        stop: threading.Event,
    ) -> tuple[list[Finding], Baseline]:
        """Run all attacks on all stacks and batches, the control (nothing withheld) first.

        A keyboard interrupt sets `stop`: what has not begun then is not run. With one worker it
        reaches the attack that is running; with several these come to their end first.
        """
        scale = Scale.of(self)
        batches = range(len(self.pixels) // self.size)
        # the undefended control, then each configuration under the threat
        open_threat = threat.control()
        runs: list[tuple[str, Sequence[Defense], Threat]] = [(CONTROL, (), open_threat)]
        runs += [(n, s, threat) for n, s in stacks.items() if n != "none" or threat != open_threat]
        jobs = [(run, b) for b in batches for run in runs]
        _check_files(attacks, [(name, b) for (name, _, _), b in jobs])
        done = 0

        def work(job: tuple[Any, int]) -> list[Attempt]:
            nonlocal done
            (name, stack, held), b = job
            attempts = self.attempts(name, stack, attacks, held, b, scale, stop)
            done += 1
            if progress is not None:
                progress(done, len(jobs), "undefended control" if name == CONTROL else name)
            return attempts

        if workers <= 1:  # threads get no interrupt
            results = [work(job) for job in jobs]
        else:
            with ThreadPoolExecutor(max_workers=workers) as pool:
                running = [pool.submit(work, job) for job in jobs]
                while not all(one.done() for one in running):
                    try:
                        wait(running)
                    except KeyboardInterrupt:  # a second one cannot hurry them either
                        stop.set()
                results = [one.result() for one in running]
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
                    [batch[i] for batch in by_run[run]] for run in (CONTROL, name) if run in by_run
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
        run: str,
        stack: Sequence[Defense],
        attacks: Sequence[Attack],
        threat: Threat,
        index: int,
        scale: Scale,
        stop: threading.Event,
    ) -> list[Attempt]:
        """Make the victim's update of one batch under a stack and run every attack on it."""
        part = slice(index * self.size, (index + 1) * self.size)
        pixels, labels = self.pixels[part], self.labels[part]
        empty = Attempt(pixels, self.names[part], scale.baselines[index])
        skipped = replace(empty, state="failed", reason=INTERRUPTED)
        try:
            view, mask = self._view(stack, threat, index, stop)
        except KeyboardInterrupt:
            stop.set()
            return [skipped for _ in attacks]
        empty, skipped = replace(empty, mask=mask), replace(skipped, mask=mask)
        attempts = []
        for attack in attacks:
            made = skipped
            if not stop.is_set():
                try:
                    made = attempt(
                        _with_own_file(attack, run, index),
                        view,
                        empty,
                        labels=labels,
                        patch_size=self.anatomy.patch_size,
                        decoys=scale.decoys,
                        seed=seed_of(self.seed, index, "attack"),
                    )
                except KeyboardInterrupt:
                    stop.set()
            if made.guess is not None and "interrupted" in made.guess.details:
                stop.set()  # it kept its best; the next attack would have to be interrupted too
            attempts.append(made)
        return attempts

    def _view(
        self,
        stack: Sequence[Defense],
        threat: Threat,
        index: int,
        stop: threading.Event,
    ) -> tuple[View, Tensor | None]:
        """Return what the server sees of one batch, and which positions were shuffled."""
        if stop.is_set():
            raise KeyboardInterrupt
        part = slice(index * self.size, (index + 1) * self.size)
        pixels, labels = self.pixels[part], self.labels[part]
        like = next(self.model.parameters())
        secret = torch.Generator().manual_seed(seed_of(self.seed, index, "defense"))
        guard = protect(copy.deepcopy(self.model).train(), stack, generator=secret)
        victim = seeded(seed_of(self.seed, index, "victim"), guard.model)  # its dropout
        with victim, guard.rewound():  # the adversary starts from the step before
            update = guard.update(
                self.normalization.apply(pixels).to(like),
                labels.to(like.device),
                loss=self.loss,
                training=self.training,
            )
        view = threat.view(guard, update, self.normalization, loss=self.loss)
        return view, guard.truth().get("shuffled")

    def input_finding(
        self, name: str, stack: Sequence[Defense], attack: InputAttack, stop: threading.Event
    ) -> Finding:
        """Return the finding of an attack on the input of the (defended) model in eval mode.

        An attack that fails, on its settings or in torch, says so and never ends the audit.
        """
        empty = Finding(name, attack.name, "inconclusive", settings=attack.settings())
        if stop.is_set():
            return replace(empty, reason=INTERRUPTED)
        like = next(self.model.parameters())
        secret = torch.Generator().manual_seed(seed_of(self.seed, 0, "defense"))
        guard = protect(copy.deepcopy(self.model), stack, generator=secret)
        generator = torch.Generator().manual_seed(self.seed)
        started = time.perf_counter()
        try:
            result = attack.evaluate(
                guard.model.eval(), self.pixels.to(like), self.labels.to(like.device),
                normalization=self.normalization, generator=generator,
            )  # fmt: skip
        except KeyboardInterrupt:
            stop.set()
            return replace(empty, reason=INTERRUPTED)
        except Blocked as error:
            return replace(empty, verdict="blocked", reason=str(error))
        except NotApplicable as error:
            return replace(empty, verdict="not applicable", reason=str(error))
        except (RuntimeError, ValueError, AssertionError) as error:
            if isinstance(error, Unprotected):
                raise
            first = (str(error).splitlines() or [""])[0]
            return replace(empty, reason=f"the attack failed: {type(error).__name__}: {first}")
        return replace(
            empty,
            reason="an attack on the input measures robustness, not what an update leaks",
            clean_accuracy=result.clean_accuracy,
            robust_accuracy={**result.robust_accuracy},
            details={**result.details, **_hits(result)},
            examples=result.examples,
            seconds=time.perf_counter() - started,
        )


def _with_own_file(attack: Attack, run: str, index: int) -> Attack:
    """Let an attack that can be resumed keep each configuration and batch in a file of its own."""
    resume = getattr(attack, "resume", None)
    if resume is None:
        return attack
    path, name = Path(resume), re.sub(r"\W+", "-", run).strip("-")[:80] or "control"
    own = path.with_name(f"{path.stem}-{name}-{index}{path.suffix}")
    return replace(attack, resume=str(own))  # type: ignore[call-arg]


def _check_files(attacks: Sequence[Attack], jobs: Sequence[tuple[str, int]]) -> None:
    """Refuse files that two runs would share, or that cannot be written, before the first run."""
    seen: set[str] = set()
    for attack in (a for a in attacks if getattr(a, "resume", None) is not None):
        for name, index in jobs:
            path: str = _with_own_file(attack, name, index).resume  # type: ignore[attr-defined]
            if path in seen:
                raise expected(
                    "a resume file for each attack and stack", f"{path} for two of them",
                    "Give each attack its own resume, and stacks names that differ in letters.",
                )  # fmt: skip
            seen.add(path)
            check_writable(path)


def _hits(result: InputResult) -> dict[str, Any]:
    return {"target reached": {**result.target_hits}} if result.target_hits else {}


@dataclass(frozen=True)
class Scale:
    """What numbers are compared with: decoys, and the no-information baseline of each batch."""

    decoys: Tensor
    baselines: tuple[Any, ...]

    @staticmethod
    def of(stage: Stage) -> Scale:
        pixels, patch = stage.pixels.cpu(), stage.anatomy.patch_size
        decoys = decoys_for(pixels, stage.seed)
        mean = covered(data.mean_image(decoys), patch)
        cut = covered(pixels, patch).split(stage.size)
        return Scale(decoys, tuple(baseline(part, patch, mean_image=mean) for part in cut))

    def level(self, batches: range, size: int) -> Baseline:
        used = [self.baselines[b] for b in batches]
        return Baseline(
            psnr=max(float(b.psnr.max()) for b in used),
            patch_psnr=max(float(b.patch_psnr.max()) for b in used),
        )
