"""From exposures to findings: every attack on every configuration, beside the control."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from vitguard.attacks.base import Attack
from vitguard.audit.attempts import INTERRUPTED, Attempt, attempt, seed_of
from vitguard.audit.exposure import Exposure, Facts, Run
from vitguard.audit.spreading import Job, Progress, Work
from vitguard.audit.verdicts import EQUALS, Beside, finding_of
from vitguard.errors import UpdateRefused, expected
from vitguard.files import check_writable
from vitguard.report.finding import Baseline, Control, Finding

__all__ = ["CONTROL", "findings", "level_of"]

CONTROL = ""
"""Name of the undefended control among the runs."""
UNDEFENDED = "none"
"""Name of the row without a defense."""
_KEPT = Facts((), (0, 0))


def findings(
    runs: Sequence[Run],
    attacks: Sequence[Attack],
    *,
    seed: int,
    work: Work,
    progress: Progress | None = None,
) -> list[Finding]:
    """Run all attacks on all batches of all runs; judge each beside the control of its exposure.

    Every exposure has one run called `CONTROL`. The row `none` is the control itself unless a run
    has that name: something is withheld there.

    A job is a batch of a run with all attacks, or, of an executor, with one of them: its update is
    then made again for each.
    """
    most = max(len(run.batches) for run in runs)
    batches = [(run, b) for b in range(most) for run in runs if b < len(run.batches)]
    _check_files(attacks, [(_title(run), b) for run, b in batches])
    parts = [attacks] if work.executor is None else [[a] for a in attacks] or [attacks]
    jobs = [_job(run, b, part, seed) for run, b in batches for part in parts]
    made = iter(work.done(jobs, progress))
    tried: dict[tuple[str, str], list[list[Attempt]]] = {run.key: [] for run in runs}
    for run, _ in batches:
        tried[run.key].append([attempt for _ in parts for attempt in next(made)])
    found = []
    for exposure in dict.fromkeys(run.exposure for run in runs):
        own = [run for run in runs if run.exposure == exposure]
        each = {run.name: tried[run.key] for run in own}
        try:
            judged = _judge(own, attacks, each, seed, work)
        except (
            KeyboardInterrupt
        ):  # what was found is judged all the same, with nothing run any more
            work.stop.set()
            judged = _judge(own, attacks, each, seed, work)
        found += [replace(finding, exposure=exposure) for finding in judged]
    return found


def _title(run: Run) -> str:
    return " ".join(part for part in (run.exposure, run.name) if part)


def level_of(facts: Iterable[Facts]) -> Baseline:
    """Return the no-information baseline of a report: the highest of its images."""
    used = [f.scale.baseline for f in facts if f.scale is not None]
    return Baseline(
        psnr=max(float(b.psnr.max()) for b in used),
        patch_psnr=max(float(b.patch_psnr.max()) for b in used),
        thumbnail=max(float(b.thumbnail.max()) for b in used),
    )


def _job(run: Run, index: int, attacks: Sequence[Attack], seed: int) -> Job[list[Attempt]]:
    """Return the job of running attacks on one batch of a run."""
    facts, expose = run.batches[index]
    title = _title(run)
    own = [_with_own_file(attack, title, index) for attack in attacks]
    return Job(
        title or "undefended control",
        partial(_without_facts, facts, expose, own, seed_of(seed, index, "attack")),
        lambda reason: [Attempt(facts, "failed", reason) for _ in attacks],
        lambda attempts: [replace(a, facts=facts) for a in attempts],
    )


def _without_facts(facts: Facts, *rest: Any) -> list[Attempt]:
    """Return attempts without the facts of the batch: these hold a thousand decoys."""
    return [replace(a, facts=_KEPT) for a in _attempts(facts, *rest)]


def _attempts(
    facts: Facts,
    expose: Callable[[], Exposure],
    attacks: Sequence[Attack],
    seed: int,
    stop: threading.Event,
) -> list[Attempt]:
    """Expose one batch of a run and run every attack on it."""
    skipped = Attempt(facts, "failed", INTERRUPTED)
    try:
        if stop.is_set():
            raise KeyboardInterrupt
        exposure = expose()
    except KeyboardInterrupt:
        stop.set()
        return [skipped for _ in attacks]
    except UpdateRefused as error:  # nothing leaves, so that there is nothing to attack
        refused = Attempt(facts, "blocked", f"the client refuses: {error}")
        return [refused for _ in attacks]
    skipped = replace(skipped, mask=exposure.mask)
    attempts = []
    for attack in attacks:
        made = skipped
        if not stop.is_set():
            try:
                made = attempt(attack, facts, exposure, seed)
            except KeyboardInterrupt:
                stop.set()
        if made.guess is not None and "interrupted" in made.guess.details:
            stop.set()  # it kept its best; the next attack would have to be interrupted too
        attempts.append(made)
    return attempts


def _judge(
    runs: Sequence[Run],
    attacks: Sequence[Attack],
    tried: Mapping[str, list[list[Attempt]]],
    seed: int,
    work: Work,
) -> list[Finding]:
    def of(name: str, i: int) -> list[Attempt]:
        return [batch[i] for batch in tried[name]]

    control = next(run for run in runs if run.name == CONTROL)
    beside = []
    for i, attack in enumerate(attacks):
        found = finding_of(UNDEFENDED, attack, of(CONTROL, i))
        alone = _Alone(control, attack, seed, work)
        beside.append(Beside(found, of(CONTROL, i), alone))
        alone.knows(beside[i])
    findings = []
    if all(run.name != UNDEFENDED for run in runs):
        findings += [replace(b.finding, control=_itself(b.finding), itself=True) for b in beside]
    for run in runs:
        for i, attack in enumerate(attacks) if run.name != CONTROL else ():
            findings.append(_bounded(finding_of(run.name, attack, of(run.name, i), beside[i]), run))
    return findings


def _itself(control: Finding) -> Control:
    return Control(control.verdict, control.psnr)


class _Alone:
    """What the parts of an attack, run alone on the control, do there; each is run once."""

    def __init__(self, control: Run, attack: Attack, seed: int, work: Work) -> None:
        self.control, self.attack, self.seed, self.work = control, attack, seed, work
        self.known: dict[str, Beside] = {}

    def knows(self, beside: Beside) -> None:
        """Take in what the whole attack did, where one part made all of its images."""
        rungs = {a.guess.details.get("rung") if a.guess else None for a in beside.attempts}
        if beside.finding.verdict == "leaks" and len(rungs) == 1 and isinstance(
            rung := rungs.pop(), str
        ):  # fmt: skip
            self.known[rung] = beside

    def __call__(self, name: str) -> Beside:
        if name not in self.known:
            part = self.attack.parts()[name]
            batches = range(len(self.control.batches))
            jobs = [_job(self.control, b, [part], self.seed) for b in batches]
            made = [attempts[0] for attempts in self.work.done(jobs)]
            self.known[name] = Beside(finding_of(UNDEFENDED, part, made), made, self)
        return self.known[name]


def _bounded(finding: Finding, run: Run) -> Finding:
    """Put what differential privacy guarantees of one update beside what the attack did."""
    finding = replace(finding, corridor=run.corridor)
    prior = 1 / (EQUALS + 1)
    if finding.identified is None or (bound := run.bound(prior)) is None:
        return finding
    told = {"reconstruction_bound": bound, "reconstruction_prior": prior}
    return replace(finding, details={**finding.details, **told})


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
