"""Position embeddings that no update contains: fixed ones, and ones that stay on the client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitguard.core import Traits
from vitguard.defenses.base import Defense, Draws, Installed, ModelDefense
from vitguard.errors import Incompatible, Unprotected, expected
from vitguard.vit import Anatomy

__all__ = ["FixedPositions", "WithheldPositions", "sincos_positions"]

Kind = Literal["sincos", "frozen", "random", "none"]


def sincos_positions(
    grid: tuple[int, int], width: int, *, temperature: float = 10000.0
) -> Float[Tensor, "patches width"]:
    """Return the 2-D sine-cosine position embedding of MAE and MoCo v3, in float64.

    For frequencies w_k = temperature^(-4k / width), k < width / 4, the embedding of the patch at
    (row, column) is [sin(column w), cos(column w), sin(row w), cos(row w)].

    Args:
        grid: Patches per column and per row.
        width: Token width; a multiple of 4.

    Raises:
        InputError: `width` is no multiple of 4.

    References:
        arXiv 2111.06377, arXiv 2104.02057.
    """
    if width % 4:
        raise expected("a token width that is a multiple of 4 for sincos positions", width)
    quarter = width // 4
    frequency = temperature ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    row, column = torch.meshgrid(
        torch.arange(grid[0], dtype=torch.float64),
        torch.arange(grid[1], dtype=torch.float64),
        indexing="ij",
    )
    across = column.reshape(-1, 1) * frequency
    down = row.reshape(-1, 1) * frequency
    return torch.cat([across.sin(), across.cos(), down.sin(), down.cos()], dim=1)


@dataclass(frozen=True)
class FixedPositions(ModelDefense):
    """Replace the learnable absolute position embedding by a buffer.

    Guarantees:
        No update contains a position gradient.
        Names of parameters and keys of the state dict stay as they are; `random` adds a key of its
        own beside them.
        `frozen` leaves the output of the model as it is.

    Does not protect against:
        Span inversion (`span`), which needs no position gradient: at batch size 1 it recovers
        the image from `frozen` and `random` positions in under a second. See sharp edges.

    Args:
        kind: `sincos` (2-D sine-cosine), `frozen` (the values the model has), `random` (normal,
            standard deviation 0.02) or `none` (zeros). Rows of prefix tokens are fixed too: zero
            but for `frozen` and `random`.

    A strict load of an original checkpoint works; its position rows are taken by `frozen` only. Of
    a protected one `random` takes the positions that were drawn (`vitguard.positions.fixed`).

    Examples:
        >>> import timm, vitguard as vg
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
        >>> guard = vg.protect(model, [vg.FixedPositions("sincos")])
        >>> "pos_embed" in dict(model.named_parameters())
        False
        >>> guard.remove()
    """

    name: ClassVar[str] = "positions"
    kind: Kind = "sincos"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise expected(f"kind among {', '.join(get_args(Kind))}", repr(self.kind))

    def check(self, model: nn.Module, anatomy: Anatomy, stack: Sequence[Defense]) -> None:
        """Raise Incompatible without absolute positions, or with a width sincos cannot fill."""
        _require_positions(anatomy, self.name)
        if self.kind == "sincos" and anatomy.width % 4:
            raise Incompatible(
                f"Expected a token width that is a multiple of 4 for sincos positions, "
                f"got {anatomy.width}. Use kind='frozen' or 'random'."
            )

    def traits(self, before: Traits, anatomy: Anatomy) -> Traits:
        """Return that positions are fixed and public, and whether they span little."""
        if self.kind == "none":
            return replace(before, positions="none", low_rank=True)
        return replace(before, positions="fixed", low_rank=self.kind == "sincos")

    def install(self, model: nn.Module, anatomy: Anatomy, draws: Draws) -> Installed:
        """Swap the parameter for a buffer of the same name, shape, dtype and device."""
        return _InstalledPositions(model, anatomy, self._values(model, anatomy, draws), self.kind)

    def known(self) -> FixedPositions:
        """Return `frozen`: the public model holds the fixed values, `random` ones too."""
        return FixedPositions("frozen")

    def _values(self, model: nn.Module, anatomy: Anatomy, draws: Draws) -> Tensor:
        parent, attribute = _locate(model, anatomy)
        current = getattr(parent, attribute).detach()
        if self.kind == "frozen":
            return current.clone()
        if self.kind == "random":
            return torch.zeros_like(current).copy_(0.02 * draws.normal(current.shape))
        return _computed(self.kind, anatomy, current)


def _computed(kind: str, anatomy: Anatomy, like: Tensor) -> Tensor:
    """Return the positions of the kinds that follow from the sizes alone."""
    values = torch.zeros_like(like)
    if kind == "sincos":
        rows = sincos_positions(anatomy.grid, anatomy.width)
        values[:, anatomy.position_prefix :] = rows.to(values)
    return values


class _InstalledPositions(Installed):
    """Fixed positions in place: the parameter is a buffer, `fixed` keeps what it must be."""

    fixed: Tensor

    def __init__(self, model: nn.Module, anatomy: Anatomy, values: Tensor, kind: str) -> None:
        super().__init__()
        self.anatomy = anatomy
        self.kind = kind
        # drawn ones are in the state dict, or whoever loads it would go on with a draw of its own
        self.register_buffer("fixed", values, persistent=kind == "random")
        parent, attribute = _locate(model, anatomy)
        assert anatomy.positions is not None
        self.order = list(parent._parameters)
        self.trained = getattr(parent, attribute).requires_grad
        delattr(parent, attribute)
        parent.register_buffer(attribute, values.clone())
        self.handles: list[Any] = [
            model.register_load_state_dict_post_hook(_KeepFixed(self, anatomy.positions)),
            parent.register_load_state_dict_post_hook(_KeepFixed(self, attribute)),
            parent.register_forward_pre_hook(_RefuseLearnable(attribute)),
            parent.register_forward_pre_hook(_RequireValues(self)),
        ]

    def restore(self) -> None:
        if self.kind in ("sincos", "none") and not self.fixed.is_meta:
            self.fixed.copy_(_computed(self.kind, self.anatomy, self.fixed))

    def restorable(self) -> frozenset[str]:
        return frozenset({"fixed"} if self.kind in ("sincos", "none") else ())

    def uninstall(self, model: nn.Module) -> None:
        parent, attribute = _locate(model, self.anatomy)
        values = getattr(parent, attribute).detach().clone()
        for handle in self.handles:
            handle.remove()
        delattr(parent, attribute)
        parent.register_parameter(attribute, nn.Parameter(values, requires_grad=self.trained))
        # the original order of parameters, for optimizers that rely on it; later ones stay behind
        for name in [*self.order, *(n for n in parent._parameters if n not in self.order)]:
            if name in parent._parameters:
                parent._parameters[name] = parent._parameters.pop(name)

    def withheld(self) -> Mapping[str, str]:
        assert self.anatomy.positions is not None
        own = (self.anatomy.positions, f"vitguard.{FixedPositions.name}.fixed")
        return dict.fromkeys(own, "fixed positions have no gradient")

    def verify(self, model: nn.Module) -> None:
        parent, attribute = _locate(model, self.anatomy)
        _RefuseLearnable(attribute)(parent, ())
        current = getattr(parent, attribute).detach()
        if self.kind != "frozen" and not _close(current, self.fixed):
            raise Unprotected(
                f"Expected the {self.kind} positions that were fixed in {attribute}, got other "
                "values. Load a state dict, which puts them back, or protect the model again."
            )


def _close(values: Tensor, fixed: Tensor) -> bool:
    """Whether they are the same up to rounding, such as that of a server's average."""
    if values.shape != fixed.shape or values.is_meta or fixed.is_meta:
        return False
    gap = (values.double() - fixed.to(values.device).double()).abs().max()
    return bool(gap <= 0.01 * fixed.double().square().mean().sqrt() + 1e-6)  # false for NaN


class _KeepFixed:
    """After a load: put the fixed values back, or take the checkpoint's where `frozen` says so.

    Of the model as well as of the part that holds them: the values may be loaded after that part.
    """

    def __init__(self, installed: _InstalledPositions, attribute: str) -> None:
        self.installed, self.attribute = installed, attribute

    def __call__(self, module: nn.Module, incompatible_keys: Any) -> None:
        path, _, attribute = self.attribute.rpartition(".")
        module = module.get_submodule(path)
        current = getattr(module, attribute).detach()
        if self.installed.kind == "frozen":
            self.installed.fixed = current.clone()
            missing = {k.rpartition(".")[2] for k in incompatible_keys.missing_keys}
            if attribute not in missing:
                self.installed.lost = frozenset()
        else:
            # a new tensor: after load_state_dict(assign=True) `current` is the checkpoint's own
            setattr(module, attribute, self.installed.fixed.to(current).clone())


class _RequireValues:
    """Before a forward: refuse positions that a move has thrown away."""

    def __init__(self, installed: Installed) -> None:
        self.installed = installed

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.installed.require_values()


class _RefuseLearnable:
    """Before a forward: refuse if something made the positions learnable again."""

    def __init__(self, attribute: str) -> None:
        self.attribute = attribute

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self.attribute in module._parameters:
            raise Unprotected(
                f"Expected fixed positions, got a learnable {self.attribute} (set_input_size or an "
                "assignment replaced it). Resize the model first, then protect it."
            )


@dataclass(frozen=True)
class WithheldPositions(ModelDefense):
    """Keep positions learnable and local: their gradient never leaves the client.

    Guarantees:
        No update contains a position gradient.

    Does not protect against:
        Span inversion with the public initial positions. The client's positions drift away from
        them slowly: after 100 local steps the image still comes back (docs/methods.md 4.5). The
        row of the class token has the gradient of that token, and the rows of the patches add up to
        that of the patch embedding's bias: both are sent.

    The position embedding is no part of what the client shares, so the server must not average it.
    """

    name: ClassVar[str] = "withheld"

    def check(self, model: nn.Module, anatomy: Anatomy, stack: Sequence[Defense]) -> None:
        """Raise Incompatible without absolute positions, or together with fixed ones."""
        _require_positions(anatomy, self.name)
        if any(isinstance(d, FixedPositions) for d in stack):
            raise Incompatible(
                "Expected either fixed or withheld positions, got both. Fixed positions have no "
                "gradient to withhold: drop one of the two."
            )

    def traits(self, before: Traits, anatomy: Anatomy) -> Traits:
        """Return that positions are trained but never sent."""
        return replace(before, positions="withheld")

    def install(self, model: nn.Module, anatomy: Anatomy, draws: Draws) -> Installed:
        """Remember the public positions; the model stays as it is."""
        return _InstalledWithheld(model, anatomy)


class _InstalledWithheld(Installed):
    public: Tensor

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        super().__init__()
        self.anatomy = anatomy
        parent, attribute = _locate(model, anatomy)
        self.register_buffer(
            "public", getattr(parent, attribute).detach().clone(), persistent=False
        )

    def uninstall(self, model: nn.Module) -> None:
        pass

    def verify(self, model: nn.Module) -> None:
        parent, attribute = _locate(model, self.anatomy)
        current = getattr(parent, attribute)
        if current.shape != self.public.shape:
            raise Unprotected(
                f"Expected {attribute} of the shape it was protected with, "
                f"{tuple(self.public.shape)}, got {tuple(current.shape)} (set_input_size or an "
                "assignment replaced it). Resize the model first, then protect it."
            )

    def publish(self, model: nn.Module) -> None:
        self.require_values()
        self.verify(model)
        parent, attribute = _locate(model, self.anatomy)
        with torch.no_grad():
            getattr(parent, attribute).copy_(self.public)

    def withheld(self) -> Mapping[str, str]:
        assert self.anatomy.positions is not None
        return {self.anatomy.positions: "withheld positions stay on the client"}


def _require_positions(anatomy: Anatomy, name: str) -> None:
    if anatomy.positions is None:
        raise Incompatible(
            f"Expected a model with an absolute position embedding for {name}, got none "
            f"({anatomy.family}). Rotary and relative positions are not replaced: leave {name} out "
            "and give others, such as noise:scale=0.01 or shuffle:ratio=0.5."
        )


def _locate(model: nn.Module, anatomy: Anatomy) -> tuple[nn.Module, str]:
    assert anatomy.positions is not None
    path, _, attribute = anatomy.positions.rpartition(".")
    return model.get_submodule(path), attribute
