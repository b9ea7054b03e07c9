"""What one attack on one configuration gave: the measurements that a report is made of."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import Tensor

from vitguard.attacks.base import Triptych
from vitguard.errors import expected
from vitguard.report.corridor import Corridor

__all__ = [
    "LEAK_GAIN",
    "MEANINGS",
    "Baseline",
    "Control",
    "Finding",
    "Mask",
    "ModelFacts",
    "Pictures",
    "Summary",
    "Verdict",
    "plain",
]

LEAK_GAIN = 6.0
"""dB above the best no-information guess at which a reconstruction is called a leak."""
Verdict = Literal["leaks", "resisted", "blocked", "not applicable", "inconclusive"]

MEANINGS: Mapping[str, str] = {
    "leaks": "The attack came at least 6 dB closer than the luckiest guess without information, or "
    "told the true image from decoys more often than chance, or recovered patches that it could "
    "prove to be right. Where the truth is not known: its guess reproduces the update.",
    "resisted": "The attack, or a rung of it that ran to its end here, leaks without the defense, "
    "on every update, and did not with it. This covers only the attacks that were run.",
    "blocked": "A tensor that the attack needs is not readable in the update.",
    "not applicable": "An assumption of the attack does not hold here; this says nothing about "
    "protection.",
    "inconclusive": "The attack fails on the undefended model too, on one update or all, was cut "
    "before its end, does not apply here in a part to which the control leaks, or nothing tells "
    "whether its guess is right. This proves nothing.",
}


@dataclass(frozen=True)
class Summary:
    """One metric over the images of a finding; the worst case is kept beside the mean.

    Args:
        max, mean, median, min: In the metric's unit (dB for PSNR); NaN where unmeasurable.
        per_image: The metric of each image, in the order of the report's images.
    """

    max: float
    mean: float
    median: float
    min: float
    per_image: tuple[float, ...] = ()

    @classmethod
    def of(cls, values: Iterable[float] | Tensor) -> Summary | None:
        """Summarise `values`; no values give None, and one NaN makes every statistic NaN."""
        each = tuple(float(v) for v in values)
        if not each:
            return None
        if any(math.isnan(v) for v in each):
            return cls(math.nan, math.nan, math.nan, math.nan, each)
        return cls(max(each), math.fsum(each) / len(each), statistics.median(each), min(each), each)

    @property
    def finite(self) -> bool:
        """Whether the worst case is a number: no NaN or infinity in it."""
        return all(math.isfinite(v) for v in (self.max, *self.per_image))

    def worst_above(self, limit: float) -> bool:
        """Whether any image lies above `limit`; a NaN never does, so ask `finite` too."""
        return any(v > limit for v in (self.max, *self.per_image))


@dataclass(frozen=True)
class Mask:
    """How well an attack told which positions were shuffled; both in [0, 1]."""

    precision: float
    recall: float


@dataclass(frozen=True)
class Control:
    """The same attack on the same images without the defense."""

    verdict: Verdict
    psnr: Summary | None = None

    def __post_init__(self) -> None:
        _check_verdict(self.verdict)


@dataclass(frozen=True)
class Pictures:
    """Images to show beside each other, each (count, channels, height, width) in [0, 1].

    They are the first images of the finding, in the order of its `psnr.per_image`.

    Args:
        original: The true images; None where they are not known.
        control: What the attack got without the defense.
        reconstruction: What the attack got with it.
        names: One name per image.
    """

    original: Tensor | None = None
    control: Tensor | None = None
    reconstruction: Tensor | None = None
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("original", "control", "reconstruction"):
            images = getattr(self, name)
            if images is not None and (images.dim() != 4 or images.shape[1] not in (1, 3)):
                raise expected(
                    f"{name} of shape (count, 1 or 3, height, width)", tuple(images.shape)
                )

    @property
    def count(self) -> int:
        """How many images there are to show."""
        return max(
            (len(x) for x in (self.original, self.reconstruction) if x is not None), default=0
        )


@dataclass(frozen=True)
class Finding:
    """One attack on one defended (or undefended) configuration.

    Args:
        defense: The spec, as on the command line; `"none"` is the undefended model.
        attack: The attack's name.
        verdict, reason: The verdict and, where it needs one, why.
        settings: The attack's settings, for the report.
        psnr, patch_psnr, ssim, mse, fft2d: Metrics over the images; None where nothing was guessed.
            `patch_psnr` (best patch-to-patch assignment) is what gates compare.
        identified: Share of images told from `decoys` others, in [0, 1].
        labels_correct: Share of labels recovered, in [0, 1].
        mask: How well shuffled positions were told.
        decoys: Images beside the true one in the identification test.
        control: The undefended run of the same attack.
        seconds: Time of the attack alone, per batch.
        details: What the attack says of itself (rung, residual, rank); JSON values.
        clean_accuracy, robust_accuracy: Of `fgsm`, in [0, 1]; the second by epsilon.
        exposure: What was attacked, where an audit looks at several things: a client's message, a
            sum; "" where it looks at one.
        undecided: What keeps this finding from deciding a gate, "" where nothing does: an attack
            that failed, was cut by its budget, or does not apply though the control leaks to it.
        unseen: How it leaks in a way that no limit in dB sees (told from decoys, patches proved,
            the update reproduced), "" where it does not, whatever its gain.
        gain: dB of the worst image above its own no-information baseline; when None the report
            takes `patch_psnr.max` above the report's baseline.
        corridor: Of a stack with differential privacy: what its bound allows, what canaries prove.
        itself: Whether it is the control itself, from which nothing was withheld, whatever the
            report says of its adversary.
        images: Pictures; they are in the HTML, PNG and TensorBoard forms only.
        examples: Attacked inputs of `fgsm`; their pictures are in HTML and TensorBoard only.
    """

    defense: str
    attack: str
    verdict: Verdict
    reason: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    psnr: Summary | None = None
    patch_psnr: Summary | None = None
    ssim: Summary | None = None
    mse: Summary | None = None
    fft2d: Summary | None = None
    identified: float | None = None
    labels_correct: float | None = None
    mask: Mask | None = None
    decoys: int | None = None
    control: Control | None = None
    seconds: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    clean_accuracy: float | None = None
    robust_accuracy: Mapping[float | str, float] | None = None
    undecided: str = ""
    unseen: str = ""
    exposure: str = ""
    gain: float | None = None
    corridor: Corridor | None = None
    itself: bool = False
    images: Pictures | None = field(default=None, compare=False, repr=False)
    examples: tuple[Triptych, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        _check_verdict(self.verdict)

    @property
    def defended(self) -> bool:
        """Whether any defense ran."""
        return self.defense != "none"

    @property
    def configuration(self) -> str:
        """The defense, and what was attacked where there are several things."""
        return f"{self.exposure}: {self.defense}" if self.exposure else self.defense

    @property
    def conclusive(self) -> bool:
        """Whether this finding can decide a gate: it leaks or resisted, and was measured."""
        measured = self.patch_psnr is not None and self.patch_psnr.finite
        return measured and self.verdict in ("leaks", "resisted")

    def to_json(self) -> dict[str, Any]:
        """Return the finding as plain JSON values, without its pictures; a missing one is None."""

        def part(summary: Summary | None, *keys: str) -> dict[str, Any] | None:
            return None if summary is None else {k: getattr(summary, k) for k in keys}

        every = ("max", "mean", "median", "min", "per_image")
        control = self.control and {
            "verdict": self.control.verdict,
            "psnr": part(self.control.psnr, "max", "mean"),
        }
        return plain(
            {
                "defense": self.defense,
                "attack": self.attack,
                "verdict": self.verdict,
                "reason": self.reason,
                "settings": self.settings,
                "psnr": part(self.psnr, *every),
                "patch_psnr": part(self.patch_psnr, *every),
                "ssim": part(self.ssim, "max", "mean"),
                "mse": part(self.mse, "min", "mean"),
                "fft2d": part(self.fft2d, "min", "mean"),
                "identified": self.identified,
                "labels_correct": self.labels_correct,
                "mask": self.mask and vars(self.mask),
                "decoys": self.decoys,
                "control": control,
                "seconds": self.seconds,
                "details": self.details,
                "clean_accuracy": self.clean_accuracy,
                "robust_accuracy": self.robust_accuracy,
                "undecided": self.undecided,
                "unseen": self.unseen,
                "exposure": self.exposure,
                "corridor": self.corridor and {**vars(self.corridor), "reached": self.identified},
            }
        )


@dataclass(frozen=True)
class ModelFacts:
    """The audited model: name, parameters, patches per image and token width."""

    name: str
    parameters: int
    patches: int | None = None
    width: int | None = None


@dataclass(frozen=True)
class Baseline:
    """What guesses made without the update score, in dB: the highest over the images of a report.

    Args:
        psnr, patch_psnr: The luckiest guess without information: one public colour, the mean image
            of other photos, some of these, smooth noise. `patch_psnr` with patches matched.
        thumbnail: Every patch flat in its own mean colour, which knows the image at one pixel a
            patch; raw and matched alike. None in reports that do not say.
    """

    psnr: float
    patch_psnr: float
    thumbnail: float | None = None


def plain(value: Any) -> Any:
    """Return `value` in JSON's own types: NaN and infinities are None, the unknown its text."""
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):  # NumPy and torch values
        return plain(value.tolist())
    return str(value)


def _check_verdict(verdict: str) -> None:
    if verdict not in get_args(Verdict):
        raise expected(f"a verdict of {', '.join(get_args(Verdict))}", repr(verdict))
