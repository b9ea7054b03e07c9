"""From exposures to findings: every attack on every configuration, beside the control."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

from vitguard.attacks.base import Attack
from vitguard.audit.attempts import INTERRUPTED, Attempt, attempt, seed_of
from vitguard.audit.exposure import Facts, Run
from vitguard.audit.verdicts import EQUALS, Beside, finding_of
from vitguard.errors import UpdateRefused, expected
from vitguard.files import check_writable
from vitguard.report.finding import Baseline, Control, Finding

__all__ = ["CONTROL", "Progress", "findings", "level_of"]

CONTROL = ""
"""Name of the undefended control among the runs."""
UNDEFENDED = "none"
"""Name of the row without a defense."""
Progress = Callable[[int, int, str], None]


def findings(
    runs: Sequence[Run],
    attacks: Sequence[Attack],
    *,
    seed: int,
    stop: threading.Event,
    workers: int = 1,
    progress: Progress | None = None,
) -> list[Finding]:
    """Run all attacks on all batches of all runs; judge each beside the control of its exposure.

    Every exposure has one run called `CONTROL`. The row `none` is the control itself unless a run
    has that name: something is withheld there.

    A keyboard interrupt sets `stop`: what has not begun then is not run. With one worker it
    reaches the attack that is running; with several these come to their end first.
    """
    most = max(len(run.batches) for run in runs)
    jobs = [(run, b) for b in range(most) for run in runs if b < len(run.batches)]
    _check_files(attacks, [(_title(run), b) for run, b in jobs])
    done = 0

    def work(job: tuple[Run, int]) -> list[Attempt]:
        nonlocal done
        run, b = job
        attempts = _attempts(run, b, attacks, seed, stop)
        done += 1
        if progress is not None:
            progress(done, len(jobs), _title(run) or "undefended control")
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
    tried: dict[tuple[str, str], list[list[Attempt]]] = {run.key: [] for run in runs}
    for (run, _), attempts in zip(jobs, results, strict=True):
        tried[run.key].append(attempts)
    found = []
    for exposure in dict.fromkeys(run.exposure for run in runs):
        own = [run for run in runs if run.exposure == exposure]
        each = {run.name: tried[run.key] for run in own}
        judged = _judge(own, attacks, each, seed, stop)
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


def _attempts(
    run: Run, index: int, attacks: Sequence[Attack], seed: int, stop: threading.Event
) -> list[Attempt]:
    """Expose one batch of a run and run every attack on it."""
    facts, expose = run.batches[index]
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
            own = _with_own_file(attack, _title(run), index)
            try:
                made = attempt(own, facts, exposure, seed_of(seed, index, "attack"))
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
    stop: threading.Event,
) -> list[Finding]:
    def of(name: str, i: int) -> list[Attempt]:
        return [batch[i] for batch in tried[name]]

    control = next(run for run in runs if run.name == CONTROL)
    beside = []
    for i, attack in enumerate(attacks):
        found = finding_of(UNDEFENDED, attack, of(CONTROL, i))
        beside.append(Beside(found, of(CONTROL, i), _Alone(control, attack, found, seed, stop)))
    findings = []
    if all(run.name != UNDEFENDED for run in runs):
        findings += [replace(b.finding, control=_itself(b.finding)) for b in beside]
    for run in runs:
        for i, attack in enumerate(attacks) if run.name != CONTROL else ():
            findings.append(_bounded(finding_of(run.name, attack, of(run.name, i), beside[i]), run))
    return findings


def _itself(control: Finding) -> Control:
    return Control(control.verdict, control.psnr)


class _Alone:
    """What the parts of an attack, run alone on the control, do there; each is run once."""

    def __init__(
        self, control: Run, attack: Attack, found: Finding, seed: int, stop: threading.Event
    ) -> None:
        self.control, self.attack, self.seed, self.stop = control, attack, seed, stop
        self.known: dict[str, Finding] = {}
        if found.verdict == "leaks" and isinstance(rung := found.details.get("rung"), str):
            self.known[rung] = found

    def __call__(self, name: str) -> Finding:
        if name not in self.known:
            part = self.attack.parts()[name]
            batches = range(len(self.control.batches))
            made = [_attempts(self.control, b, [part], self.seed, self.stop)[0] for b in batches]
            self.known[name] = finding_of(UNDEFENDED, part, made)
        return self.known[name]


def _bounded(finding: Finding, run: Run) -> Finding:
    """Put what differential privacy guarantees of one update beside what the attack did."""
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
