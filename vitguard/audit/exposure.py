"""An exposure: one thing that left a machine, with what the audit knows about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from vitguard import data
from vitguard.core import View
from vitguard.defenses.base import Defense
from vitguard.metrics import Baseline, baseline

__all__ = ["Exposure", "Facts", "Run", "Scale", "bound_of", "covered", "decoys_for"]

_DECOYS = 100


@dataclass(frozen=True)
class Scale:
    """What numbers about a batch are compared with.

    Args:
        decoys: Images that are not in the batch, pixels in [0, 1].
        baseline: What guesses without information score on each image.
    """

    decoys: Tensor
    baseline: Baseline

    @staticmethod
    def of(truths: Tensor, patch_size: tuple[int, int], decoys: Tensor) -> Scale:
        """Return the scale of `truths`; the mean image is that of the decoys."""
        mean = covered(data.mean_image(decoys), patch_size)
        return Scale(decoys, baseline(covered(truths, patch_size), patch_size, mean_image=mean))


@dataclass(frozen=True)
class Facts:
    """What the audit knows of a batch and its adversary does not.

    Args:
        names: Names of the images.
        patch_size: (height, width) of a patch in pixels.
        truths: The images, pixels in [0, 1]; None where nobody knows them.
        labels: Their classes, as far as they are known.
        scale: What scores are compared with; None without `truths`.
        certain: Whether the audit made the update of these very images. Where somebody only says
            so, a guess that explains the update leaks whatever the images are said to be.
    """

    names: tuple[str, ...]
    patch_size: tuple[int, int]
    truths: Tensor | None = None
    labels: Tensor | None = None
    scale: Scale | None = None
    certain: bool = True


@dataclass(frozen=True)
class Exposure:
    """One thing that left a machine: what the adversary sees of it.

    Args:
        view: What the threat grants.
        mask: Positions that were shuffled, shape (batch, patches); None without a shuffle.
    """

    view: View
    mask: Tensor | None = None


class Run(NamedTuple):
    """One configuration: a name and, for each of its batches, the facts and how it is exposed.

    `bound` maps the chance of a blind guess to the largest chance of any attack that the stack
    guarantees; None where it guarantees none.
    """

    name: str
    batches: tuple[tuple[Facts, Callable[[], Exposure]], ...]
    bound: Callable[[float], float | None] = lambda prior: None


def bound_of(stack: Sequence[Defense], steps: int) -> Callable[[float], float | None]:
    """Return the guarantee of a stack for one update of so many local steps, as in `Run`."""

    def bound(prior: float) -> float | None:
        held = [d.reconstruction_bound(prior, steps) for d in stack]
        return min((b for b in held if b is not None), default=None)

    return bound


def covered(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cut images to whole patches: the model never sees a border that no patch covers."""
    high, wide = (n - n % p for n, p in zip(images.shape[-2:], patch_size, strict=True))
    return images[..., :high, :wide]


def decoys_for(truth: Tensor, seed: int) -> Tensor:
    """Return decoys with as many channels as `truth`: grey ones for a single channel."""
    channels, size = truth.shape[1], (truth.shape[-2], truth.shape[-1])
    colour = truth if channels == 3 else truth.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    return data.with_channels(data.decoys(_DECOYS, size, seed=seed, truth=colour), channels)
