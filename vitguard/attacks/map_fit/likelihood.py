"""How probable the seen update is under a simulated one: noise, rounding, pruning, unknown scale.

Each tensor t has Gaussian noise of a level of its own,

    sum_t |c S_t(x) - g_t|^2 / sigma_t^2,

with one unknown scale c for all (clipping). Entries that pruning zeroed are known to lie below the
smallest one kept: only what a simulated entry has above that counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitguard.attacks.budget import charge
from vitguard.core import View
from vitguard.errors import NotApplicable

__all__ = ["Likelihood", "Misfit"]

_FINEST = 1e-6  # rounding of float32 in a simulated update, relative to a tensor
_SPARSE = 0.7  # share of entries that are not zero, above which zeros are no pruning
_SHY = 100.0  # entries that say a level is like the other tensors': few numbers fit by chance
_LEVELS = 1 << 16  # distinct values above which a tensor was not quantised


@dataclass(frozen=True)
class Misfit:
    """What is left of the update at some images.

    Args:
        scale: c.
        rest: g_t - c S_t of each tensor, zero where it does not count.
        active: Which entries count; None for all.
    """

    scale: float
    rest: list[Tensor]
    active: list[Tensor | None]

    def squares(self) -> list[float]:
        """Return |rest_t|^2 of each tensor."""
        return torch.stack([r.double().square().sum() for r in self.rest]).tolist()

    def counts(self) -> list[int]:
        """Return how many entries of each tensor count."""
        return [
            r.numel() if a is None else int(a.sum())
            for r, a in zip(self.rest, self.active, strict=True)
        ]


@dataclass(eq=False)
class Likelihood:
    """The seen tensors and what is known of their damage.

    Args:
        names, seen: The tensors, in the model's type.
        kept: Entries that were not zeroed; None where none were.
        bounds: Size below which zeroed entries lie.
        known: Standard deviation of the noise of each tensor, where it is public or shows in the
            numbers themselves; None where it is not.
        sizes: Root mean square of each tensor.
    """

    names: list[str]
    seen: list[Tensor]
    kept: list[Tensor | None]
    bounds: list[float]
    known: list[float | None]
    sizes: list[float]

    @staticmethod
    def of(view: View) -> Likelihood:
        """Read all tensors that can be read and are not zero.

        Raises:
            NotApplicable: There is none.
        """
        like = next(view.model.parameters())
        tensors = {
            name: t.detach()
            for name, t in view.update.tensors.items()
            if t.is_floating_point() and t.numel() and bool(t.any())
        }
        if not tensors:
            raise NotApplicable("no tensor of the update can be read, or all are zero")
        kept, bounds, known, sizes = [], [], [], []
        for tensor in tensors.values():
            mask = tensor != 0
            sparse = float(mask.double().mean()) < _SPARSE
            kept.append(mask if sparse else None)
            bounds.append(float(tensor[mask].abs().min()) if sparse else 0.0)
            sizes.append(float(tensor[mask].double().square().mean().sqrt()))
            known.append(_level(view, tensor, sizes[-1], sparse))
        seen = [t.to(like) for t in tensors.values()]
        return Likelihood(list(tensors), seen, kept, bounds, known, sizes)

    def only(self, names: Sequence[str]) -> Likelihood:
        """Return the likelihood of these tensors, in this order."""
        at = [self.names.index(name) for name in names]
        parts = (self.names, self.seen, self.kept, self.bounds, self.known, self.sizes)
        return Likelihood(*([part[i] for i in at] for part in parts))  # type: ignore[arg-type]

    def misfit(self, made: Sequence[Tensor], levels: Sequence[float]) -> Misfit:
        """Compare a simulated update with the one seen; c is the best for these levels."""
        scale = self._scale(made, levels)
        rest, active = [], []
        for m, g, kept, bound in zip(made, self.seen, self.kept, self.bounds, strict=True):
            m = scale * m
            if kept is None:
                rest.append(g - m)
                active.append(None)
                continue
            over = m.abs() > bound
            beyond = m.clamp(-bound, bound) - m
            rest.append(torch.where(kept, g - m, beyond))
            active.append(kept | over)
        charge(elements=0.5 * sum(m.numel() for m in made), calls=6.0 * len(rest))
        return Misfit(scale, rest, active)

    def _scale(self, made: Sequence[Tensor], levels: Sequence[float]) -> float:
        across, own = [], []
        for m, g, kept, level in zip(made, self.seen, self.kept, levels, strict=True):
            m = m if kept is None else m * kept
            across.append((m * g).sum(dtype=torch.float64) / level**2)
            own.append(m.square().sum(dtype=torch.float64) / level**2)
        power = float(torch.stack(own).sum())
        scale = float(torch.stack(across).sum()) / power if power > 0 else 1.0
        return scale if math.isfinite(scale) and scale > 0 else 1.0

    def levels(self, misfit: Misfit) -> list[float]:
        """Return the level of each tensor: the root mean square of its misfit, if not known less.

        The known one is the least: far from the truth all of the misfit counts as noise. Tensors of
        few entries fit by chance, so each is drawn to the typical misfit, relative to its size, by
        as much as `_SHY` entries would.
        """
        squares, counts = misfit.squares(), misfit.counts()
        relative = sum(q / s**2 for q, s in zip(squares, self.sizes, strict=True))
        typical = relative / max(sum(counts), 1)
        made = []
        for square, count, size, known in zip(squares, counts, self.sizes, self.known, strict=True):
            level = math.sqrt((square + _SHY * typical * size**2) / (count + _SHY))
            made.append(max(level, known or 0.0, _FINEST * size))
        return made

    def discrepancy(self, misfit: Misfit) -> float | None:
        """Return |rest|^2 over what the known noise explains; None where a level is unknown."""
        if any(level is None for level in self.known):
            return None
        total = sum(
            square / max(level or 0.0, _FINEST * size) ** 2
            for square, level, size in zip(misfit.squares(), self.known, self.sizes, strict=True)
        )
        return total / max(sum(misfit.counts()), 1)


def _level(view: View, tensor: Tensor, size: float, sparse: bool) -> float | None:
    """Return the standard deviation of a tensor's noise, or None."""
    scale = view.traits.noise
    if scale:
        return None if sparse else size * scale / math.sqrt(1 + scale**2)
    rounding = _rounding(tensor)
    if rounding is None and view.traits.exact:
        return None if sparse else _FINEST * size
    return rounding


def _rounding(tensor: Tensor) -> float | None:
    """Return the standard deviation of rounding to 16 bits or to an even grid, None where fine."""
    for kind in (torch.bfloat16, torch.float16):
        if tensor.dtype == kind or bool((tensor.to(kind).to(tensor.dtype) == tensor).all()):
            root = float(tensor.double().square().mean().sqrt())
            return torch.finfo(kind).eps * root / math.sqrt(12 * 2)
    values = tensor.flatten()[: 1 << 20].double().abs().unique()
    values = values[values > 0]
    if tensor.numel() < 1000 or not 1 < len(values) < min(_LEVELS, tensor.numel() // 4):
        return None
    step = float(torch.cat([values[:1], values.diff()]).min())
    on_grid = (values / step - (values / step).round()).abs().max()
    return step / math.sqrt(12) if float(on_grid) < 0.05 else None
