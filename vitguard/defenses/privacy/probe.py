"""Trying a model out on noise, before anything is learned: do its examples meet anywhere?

One example of a batch is replaced, all draws being equal: the outputs and gradients of the others
must stay, and so must every buffer, and what the next batch gives. Adding an example must leave
the others' outputs too. Nothing of the data is needed and nothing the passes did remains.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map
from torch.utils.checkpoint import CheckpointError

from vitguard.defenses.base import Installed
from vitguard.defenses.privacy.checks import checkpointing
from vitguard.defenses.privacy.engine import Engine, Watch, pseudo_losses, structure
from vitguard.defenses.privacy.kept import Kept, differing, same_draws
from vitguard.defenses.privacy.losses import auxiliary_losses
from vitguard.defenses.privacy.tape import full_precision
from vitguard.defenses.privacy.training import PrivateTraining, paused
from vitguard.errors import Incompatible
from vitguard.vit import checkpoints_refused

__all__ = ["probe"]

_BATCH = 3
_LARGE = "a thousand times larger"
_CHANGES = [(0, "other noise"), (1, _LARGE), (2, "zero")]
_OUTPUTS = [  # one forward pass each
    (0, "a copy of the next"), (0, _LARGE), (2, _LARGE), (0, "turned over"), (1, "turned over"),
    (2, "turned over"), (1, "other noise"), (2, "other noise"),
]  # fmt: skip
_PROBED: weakref.WeakKeyDictionary[nn.Module, set[int]] = weakref.WeakKeyDictionary()

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def probe(
    model: nn.Module,
    engine: Engine,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Refuse a model in which examples meet; once for each structure of a model, in its mode.

    A pass of other arguments is tried out too, one under another autocast, and one that trains
    other parameters.

    Args:
        args: Arguments like those of a pass, and `kwargs` too: noise takes the place of every
            tensor with a row for each example.

    Raises:
        Incompatible: The outputs or the gradient of one example depend on another, a buffer learns
            from the data, one batch changes the next, or the recorded gradients are not those of
            single examples.
    """
    known = _PROBED.setdefault(model, set())
    trained = tuple(p.requires_grad for p in model.parameters())
    call = _call(args, dict(kwargs or {}))
    kind = hash((structure(model, without=PrivateTraining), trained, call))
    if kind in known:
        return
    with paused(model), torch.enable_grad():
        kept = Kept(model)
        try:
            with checkpoints_refused():
                _Trial(model, engine, kept, _noise_like(args, dict(kwargs or {}))).run()
        except CheckpointError as error:  # no switch told of it
            raise checkpointing("its forward pass") from error
        finally:
            engine.close()
            kept.give_back()
    known.add(kind)


def _call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Return how a model is called, which is the same for every batch of a loop.

    Switches and words count by their value; numbers do not, as some loops count in them.
    """
    leaves, spec = tree_flatten((args, kwargs))
    device = next((t.device.type for t in leaves if isinstance(t, Tensor)), "cpu")
    low = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return repr(spec), tuple(x if isinstance(x, bool | str) else type(x) for x in leaves), low


def _noise_like(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    """Return the arguments of a pass over a few examples of noise."""
    size = next((len(t) for t in tree_leaves((args, kwargs)) if _rows(t)), 0)
    generator = torch.Generator().manual_seed(0)

    def noise(value: Any) -> Any:
        if not _rows(value) or len(value) != size:
            return value
        if not value.is_floating_point():
            return value[:1].repeat(_BATCH, *[1] * (value.dim() - 1))
        return torch.randn(_BATCH, *value.shape[1:], generator=generator).to(value)

    return tree_map(noise, (args, kwargs))


def _rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _replaced(inputs: Inputs, example: int, how: str) -> Inputs:
    generator = torch.Generator().manual_seed(1)

    def change(value: Any) -> Any:
        if not (_rows(value) and len(value) == _BATCH and value.is_floating_point()):
            return value
        other = torch.randn(value.shape[1:], generator=generator).to(value)
        new = {
            "other noise": other,
            _LARGE: 1e3 * other,
            "zero": torch.zeros_like(other),
            "turned over": -value[example],
            "a copy of the next": value[(example + 1) % _BATCH],
        }[how]
        value = value.clone()
        value[example] = new
        return value

    return tree_map(change, inputs)


def _without_first(inputs: Inputs) -> Inputs:
    return tree_map(lambda t: t[1:] if _rows(t) and len(t) == _BATCH else t, inputs)


@dataclass
class _Seen:
    """What a pass gave, with a row for each example: outputs; a norm and a product for each
    parameter's gradient."""

    outputs: Tensor
    norms: Tensor
    products: Tensor


class _Trial:
    """The passes over one model, each from the state that `kept` holds or the one before left."""

    def __init__(self, model: nn.Module, engine: Engine, kept: Kept, inputs: Inputs) -> None:
        self.model, self.engine, self.kept, self.inputs = model, engine, kept, inputs
        self._directions: dict[str, Tensor] = {}
        self._low = False
        self._unsteady = 0.0

    def run(self) -> None:
        self.kept.restore()
        self._verify()
        self.kept.restore()
        base = self._measure(self.inputs)
        if not self.engine.check:
            self.kept.restore()
            self._compare_plain(base)
        self.kept.restore()
        self._expect_repeatable(base, self._measure(self.inputs))
        state, after = self.kept.changed(), self._measure(self.inputs)
        for example, how in _CHANGES:
            self.kept.restore()
            changed = self._measure(_replaced(self.inputs, example, how))
            self._expect_still(state)
            self._expect_same(base, changed, _others(example), f"example {example} was {how}")
            if how == _LARGE:
                self._expect_no_memory(after, self._measure(self.inputs))
        for example, how in _OUTPUTS:
            self.kept.restore()
            outputs = self._outputs(_replaced(self.inputs, example, how))
            self._expect_still(state)
            self._expect_same_outputs(
                base.outputs, outputs, _others(example), f"example {example} was {how}"
            )
        self._expect_same_without_first()

    # passes

    def _forward(self, inputs: Inputs, *, watched: Any = None) -> Any:
        for piece in self.model.modules():
            if isinstance(piece, Installed):
                piece.abandon()
                keys = torch.zeros(_BATCH) if piece.one_draw() else torch.arange(_BATCH)
                piece.key_examples(keys.long())
        args, kwargs = inputs
        if watched is None:
            return self.model(*args, **kwargs)
        for tensor in tree_leaves(inputs):
            if isinstance(tensor, Tensor):
                watched.mark(tensor, True)
        with Watch(watched):
            return self.model(*args, **kwargs)

    def _verify(self) -> None:
        """Compare what the engine records with plain gradients in the same graph."""
        inputs = tree_map(lambda t: t.clone().requires_grad_() if _floats(t) else t, self.inputs)
        images = next(t for t in tree_leaves(inputs) if _floats(t))
        with same_draws(self.model):
            tape = self.engine.tape(self.model, _BATCH)
            outputs = self._forward(inputs, watched=tape)
            auxiliary = auxiliary_losses(self.model, _BATCH)
            self.engine.verify(self.model, tape, (outputs, auxiliary), images)
        self.engine.close()

    def _measure(self, inputs: Inputs) -> _Seen:
        with same_draws(self.model):
            tape = self.engine.tape(self.model, _BATCH)
            outputs = self._forward(inputs, watched=tape)
            everything = (outputs, auxiliary_losses(self.model, _BATCH))
            values = pseudo_losses(everything, _BATCH)
            self._low = tape.low
            values.sum().backward()
        with full_precision(tape.device):
            uses = tape.collect()
            columns = [
                (use.squared_norms(), use.along(self._direction(name, use)))
                for name, use in sorted(uses.items())
            ]
        for p in self.model.parameters():
            p.grad = None
        tape.close()
        squares, products = zip(*columns, strict=True)
        return _Seen(_flat(everything), _table(squares).sqrt(), _table(products))

    def _outputs(self, inputs: Inputs) -> Tensor:
        """Return the outputs of a pass that records nothing, of the same kind as `_measure`'s."""
        with same_draws(self.model):
            tape = self.engine.tape(self.model, _BATCH)
            outputs = self._forward(inputs, watched=tape)
            flat = _flat((outputs, auxiliary_losses(self.model, _BATCH)))
        tape.close()
        self.engine.close()
        return flat

    def _direction(self, name: str, use: Any) -> Tensor:
        if name not in self._directions:
            shape, like = self.model.get_parameter(name).shape, use.squared_norms()
            generator = torch.Generator().manual_seed(len(self._directions))
            self._directions[name] = torch.randn(shape, generator=generator).to(
                like.device, self.model.get_parameter(name).dtype
            )
        return self._directions[name]

    def _compare_plain(self, base: _Seen) -> None:
        """Compare an engine that cannot do so itself with plain gradients of single examples."""
        names = sorted(self._directions)
        parameters = [self.model.get_parameter(n) for n in names]
        with same_draws(self.model):
            outputs = self._forward(self.inputs)
            values = pseudo_losses((outputs, auxiliary_losses(self.model, _BATCH)), _BATCH)
            for i in range(_BATCH):
                found = torch.autograd.grad(
                    values[i], parameters, retain_graph=True, materialize_grads=True
                )
                norms = torch.stack([g.norm() for g in found]).double().cpu()
                pairs = zip(names, found, strict=True)
                products = torch.stack([(self._directions[n] * g).sum() for n, g in pairs])
                plain = _Seen(base.outputs[i : i + 1], norms[None], products.double().cpu()[None])
                own = _Seen(*(t[i : i + 1] for t in vars(base).values()))
                tolerance = self._tolerance(1e-3, 3e-2)
                self._expect_same(plain, own, [0], "it was computed alone", tolerance)

    # comparisons

    def _tolerance(self, usual: float, low: float) -> float:
        exact = next(self.model.parameters()).dtype == torch.float64
        return low if self._low else 1e-9 if exact else usual

    def _expect_still(self, state: dict[str, Tensor]) -> None:
        if (name := differing(state, self.kept.changed())) is not None:
            raise Incompatible(
                "Expected buffers and parameters that a forward pass leaves alone, got "
                f"{name}, which learns from the images and would be published without noise. "
                "Remove the statistics (an observer, a running mean) or freeze them."
            )

    def _expect_same(
        self, base: _Seen, other: _Seen, rows: list[int], when: str, tolerance: float | None = None
    ) -> None:
        tolerance = self._tolerance(1e-5, 2e-3) if tolerance is None else tolerance
        self._expect_same_outputs(base.outputs, other.outputs, rows, when)
        for i in rows:
            if not _gradient_away(base, other, i) <= tolerance:
                raise _meet("gradient", i, when, "the backward pass")

    def _expect_same_outputs(self, base: Tensor, other: Tensor, rows: list[int], when: str) -> None:
        for i in rows:
            if _away(base[i], other[i]) > self._tolerance(1e-5, 2e-3):
                where = "the forward pass (a mean or a maximum over the batch, one scale for all?)"
                raise _meet("outputs", i, when, where)

    def _expect_repeatable(self, base: _Seen, again: _Seen) -> None:
        self._unsteady = _farthest(base, again)
        if self._unsteady > self._tolerance(1e-5, 2e-3):
            raise Incompatible(
                "Expected a model that draws from the generators of torch, numpy.random and random "
                "or from a torch.Generator of a layer, got one whose pass cannot be repeated: "
                "whether its examples meet cannot be told. Use one of those generators."
            )

    def _expect_no_memory(self, base: _Seen, other: _Seen) -> None:
        if _farthest(base, other) > max(1e-8, 10 * self._unsteady):
            raise Incompatible(
                "Expected a model that gives the same for a batch whatever came before it, got one "
                "that remembers an earlier batch in an attribute (a running mean, a queue?): a "
                "record would act on steps that it is not part of. Remove that memory."
            )

    def _expect_same_without_first(self) -> None:
        """Compare outputs in evaluation mode, where no draw depends on the number of examples."""
        seen = []
        for inputs in (self.inputs, _without_first(self.inputs)):
            self.kept.restore()
            self.model.eval()
            with same_draws(self.model), torch.no_grad():
                args, kwargs = inputs
                seen.append(_flat(self.model(*args, **kwargs), len(seen)))
        for i in range(1, _BATCH):
            if _away(seen[0][i], seen[1][i - 1]) > self._tolerance(1e-3, 3e-2):
                where = "the forward pass (the size of the batch, or a place in it?)"
                raise _meet("outputs", i, "example 0 was left out", where)


def _others(example: int) -> list[int]:
    return [i for i in range(_BATCH) if i != example]


def _floats(value: Any) -> bool:
    return _rows(value) and len(value) == _BATCH and value.is_floating_point()


def _flat(outputs: Any, fewer: int = 0) -> Tensor:
    """Return all outputs that have a row for each example, side by side, float64 on the CPU."""
    count = _BATCH - fewer
    rows = [t for t in tree_leaves(outputs) if _rows(t) and len(t) == count]
    return torch.cat([t.detach().double().cpu().reshape(count, -1) for t in rows], 1)


def _table(columns: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([c.detach().double().cpu() for c in columns], 1)


def _gradient_away(one: _Seen, other: _Seen, example: int) -> float:
    """Return how far an example's gradients are apart, in parts of the first."""
    norms = one.norms[example]
    size = norms + 1e-2 * norms.norm() + 1e-30
    if not bool(torch.isfinite(size).all()):
        return 0.0  # the clipped sum leaves such an example out
    moved = (norms - other.norms[example]).abs()
    moved = torch.maximum(moved, (one.products[example] - other.products[example]).abs())
    return float((moved / size).nan_to_num(torch.inf).max())


def _farthest(one: _Seen, other: _Seen) -> float:
    rows = range(_BATCH)
    outputs = max(_away(one.outputs[i], other.outputs[i]) for i in rows)
    return max(outputs, *(_gradient_away(one, other, i) for i in rows))


def _away(one: Tensor, other: Tensor) -> float:
    """Return how far two rows are apart, in parts of the first; what is not finite must be so."""
    finite = torch.isfinite(one)
    if not bool((torch.isfinite(other) == finite).all()):
        return float("inf")
    one, other = one[finite], other[finite]
    size = float(one.norm())
    return float((one - other).norm()) / size if size else float((one - other).norm() > 0)


def _meet(what: str, example: int, when: str, where: str) -> Incompatible:
    return Incompatible(
        f"Expected each example's {what} to depend on that example alone, got other {what} for "
        f"example {example} when {when}: examples meet in {where}. Differential privacy cannot "
        "hold for this model: replace the layer by one that treats each example alone."
    )
