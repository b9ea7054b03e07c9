"""What an audit found, in one sentence and as a gate; it knows no file format.

Verdicts come from the audit. Here `resisted` is always reported together with the attacks that were
run, and an undecided gate never passes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vitguard.errors import LeakFound, expected
from vitguard.report.finding import LEAK_GAIN, Baseline, Finding, ModelFacts

__all__ = ["AuditResults"]


@dataclass(frozen=True)
class AuditResults:
    """Everything an audit found: what each form of a report is written from.

    The fields are explained at `AuditReport`, which adds the forms.
    """

    model: ModelFacts
    images: tuple[str, ...]
    batch_size: int
    baseline: Baseline
    findings: tuple[Finding, ...]
    weights: str
    update: str
    seed: int = 0
    threat: Mapping[str, Any] = field(default_factory=dict)
    families_not_run: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    interrupted: bool = False
    advice: str = ""
    version: str = field(default_factory=lambda: _version())

    def gain(self, finding: Finding) -> float | None:
        """Return dB of the worst image above the no-information baseline; None if unmeasured."""
        if finding.gain is not None:
            return finding.gain
        if finding.patch_psnr is None:
            return None
        return finding.patch_psnr.max - self.baseline.patch_psnr

    def is_control(self, finding: Finding) -> bool:
        """Whether a finding is the control itself: no defense, and nothing withheld."""
        return not finding.defended and (finding.itself or not self.threat.get("withheld"))

    def configurations(self, *, defended: bool = False) -> dict[str, list[Finding]]:
        """Return the findings by configuration, in the order of the report.

        One is a defense, of one thing that was attacked. The control is left out if asked.

        Where something is withheld the row without a defense is a configuration like any other.
        """
        groups: dict[str, list[Finding]] = {}
        for finding in self.findings:
            if not (defended and self.is_control(finding)):
                groups.setdefault(finding.configuration, []).append(finding)
        return groups

    def outcome(self) -> str:
        """Say in one sentence how the defended configurations fared, and under which attacks."""
        groups = self.configurations(defended=True)
        if not groups:
            return "No defended configuration was audited."
        if self.interrupted:
            return f"Interrupted before its end: {self._fared(groups)}"
        return self._fared(groups)

    def _fared(self, groups: dict[str, list[Finding]]) -> str:
        leaking, tried, resisting, blocking = 0, {}, 0, 0
        for findings in groups.values():
            if any(f.verdict == "leaks" for f in findings):
                leaking += 1
            elif all(f.verdict == "blocked" for f in findings):
                blocking += 1
            elif (resisted := [f.attack for f in findings if f.verdict == "resisted"]) and not any(
                f.undecided for f in findings
            ):
                resisting += 1
                tried |= dict.fromkeys(resisted)
        verb = "leaks" if leaking == 1 else "leak"
        # what is seen of a round need not be defended
        several = any(f.exposure for f in self.findings)
        things = "messages and sums" if several else "defended configurations"
        parts = [f"{leaking} of {len(groups)} {things} {verb}"]
        if len(groups) == 1:
            one = "What was seen leaks" if several else "The defended configuration leaks"
            parts = [one if leaking else "No leak was shown"]
        if resisting:
            parts.append(f"{resisting} resisted the attacks that were run ({', '.join(tried)})")
        if blocking:
            verb = "was" if blocking == 1 else "were"
            parts.append(f"{blocking} {verb} not tested, because every attack was blocked")
        if undecided := len(groups) - leaking - resisting - blocking:
            parts.append(f"{undecided} could not be decided")
        return "; ".join(parts) + "."

    def headline(self) -> str:
        """Name batch size, update kind, weights, and the attack families that were not run.

        Of a server that crafts weights it names the craft: one says nothing of the others.
        """
        missing = ", ".join(self.families_not_run) or "none"
        craft = self.threat.get("craft")
        crafted = f"Malicious server, one craft: {craft}; another may tell more. " if craft else ""
        return crafted + (
            f"Batch size {self.batch_size}; update: {self.update}; weights: {self.weights}; "
            f"attack families not run: {missing}."
        )

    def gate(self, max_psnr: float | None = None, max_gain: float | None = None) -> int:
        """Return the exit code of a gate over the defended configurations.

        0: no gate was asked for, or every defended configuration stays within it and was tested by
        at least one conclusive attack, with every measurement finite and no attack undecided: one
        that failed, was cut, or does not apply though the control leaks to it might have leaked,
        whatever a cheaper one says. 1: an image of some finding
        exceeds `max_psnr` (dB, matched-patch PSNR) or `max_gain` (dB above the no-information
        baseline), whatever the verdict, or leaks in a way that no dB limit sees. 3: undecided. A
        configuration that only met attacks which were blocked, not applicable or inconclusive has
        not been tested, and a report without a defended configuration tests none. An interrupted
        audit is undecided whether or not a gate was asked for. 1 goes before 3.

        Raises:
            InputError: A limit is not a finite number.
        """
        if max_psnr is None and max_gain is None:
            return 3 if self.interrupted else 0
        if self._exceeding(max_psnr, max_gain):
            return 1
        return 3 if self._undecided() else 0

    def raise_if_leaks(self, max_psnr: float | None = None, max_gain: float | None = None) -> None:
        """Raise if a defended configuration leaks.

        Without limits: if a verdict says so, a measurement is not finite, or no attack on a
        configuration was conclusive. With limits: whenever `gate` would not return 0.

        Raises:
            LeakFound: Names the worst finding, or the configurations that stayed undecided.
            InputError: A limit is not a finite number.
        """
        if max_psnr is None and max_gain is None:
            defended = [f for f in self.findings if not self.is_control(f)]
            bad = [f for f in defended if f.verdict == "leaks" or self._is_broken(f)]
        else:
            bad = self._exceeding(max_psnr, max_gain)
        if bad:
            raise LeakFound(self._name_worst(bad))
        if undecided := self._undecided():
            raise LeakFound(
                f"Undecided for {'; '.join(undecided)}. A failed attack is no evidence."
            )

    def _exceeding(self, max_psnr: float | None, max_gain: float | None) -> list[Finding]:
        for name, limit in (("max_psnr", max_psnr), ("max_gain", max_gain)):
            number = isinstance(limit, int | float) and math.isfinite(limit)
            if limit is not None and not number:
                raise expected(f"{name} as a finite number of dB", repr(limit))

        def exceeds(finding: Finding) -> bool:
            measured, gain = finding.patch_psnr, self.gain(finding)
            by_gain = gain is not None and gain >= LEAK_GAIN
            if finding.verdict == "leaks" and (finding.unseen or not by_gain):
                return True  # told from decoys, or reproduces the update: no dB limit sees that
            too_close = max_psnr is not None and measured and measured.worst_above(max_psnr)
            too_far_up = max_gain is not None and gain is not None and gain > max_gain
            return bool(too_close or too_far_up)

        return [f for f in self.findings if not self.is_control(f) and exceeds(f)]

    def _undecided(self) -> list[str]:
        """Return the configurations that no attack decided, each with the reason."""
        if self.interrupted:
            return ["the whole audit: it was interrupted"]
        groups = self.configurations(defended=True)
        found = [f"{name} ({why})" for name, fs in groups.items() if (why := self._open(fs))]
        return found if groups else ["any defense (none was audited)"]

    def _open(self, findings: list[Finding]) -> str:
        for f in findings:
            if f.undecided:  # of a leak too: a gate may allow it up to a limit
                return f"{f.attack}: {f.undecided}"
            if self._is_broken(f):
                return f"{f.attack}: a measurement is no finite number"
        if any(f.conclusive for f in findings):
            return ""
        if all(f.verdict == "blocked" for f in findings):
            return "every attack was blocked: what it needs cannot be read; add others"
        return "no attack was conclusive; add one that leaks on the undefended model"

    def _is_broken(self, finding: Finding) -> bool:
        """Whether a measurement that should be there is not a finite number."""
        if finding.patch_psnr is None:
            return False
        gain = self.gain(finding)
        return not (finding.patch_psnr.finite and gain is not None and math.isfinite(gain))

    def _name_worst(self, findings: list[Finding]) -> str:
        def badness(finding: Finding) -> float:
            value = finding.patch_psnr.max if finding.patch_psnr else -math.inf
            return math.inf if math.isnan(value) else value

        worst = max(findings, key=badness)
        text = f"{worst.configuration} under {worst.attack}: {worst.verdict}"
        if worst.patch_psnr is not None:
            text += f", {worst.patch_psnr.max:.1f} dB matched-patch PSNR"
            text += f" where knowing nothing scores at most {self.baseline.patch_psnr:.1f} dB"
        if worst.reason:
            text += f" ({worst.reason})"
        return text + (f"; {len(findings) - 1} more." if len(findings) > 1 else ".")


def _version() -> str:
    return sys.modules["vitguard"].__version__  # no import: the package imports this module's users
