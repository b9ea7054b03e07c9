"""The book-keeping engine: one forward, one backward, every example's gradient clipped.

A function mode watches the forward pass. Whatever an operation does with a trainable parameter
goes through a rule (rules.py) that records each example's own gradient on a tape; a use without
one is refused or computed example by example, never passed over. The first pass of every kind is
compared with plain gradients of single examples in the same graph, draws included.

References: Goodfellow (arXiv:1510.01799), Bu et al. (book-keeping, arXiv:2210.00038).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from vitguard.defenses.privacy.clipping import Clipping, clipping_factors, joint_norm
from vitguard.defenses.privacy.functions import REMADE, note
from vitguard.defenses.privacy.rules import RULES, expand_rule, one_by_one, tensors_in
from vitguard.defenses.privacy.tape import Tape, full_precision
from vitguard.errors import Incompatible, Unprotected

__all__ = [
    "Clipped", "Engine", "Watch", "clipped_sum", "pseudo_losses", "refuse_float16", "structure"
]  # fmt: skip

_EXPANSIONS = ("expand", "expand_as", "repeat")


class Watch(TorchFunctionMode):
    """Send each operation on a root through its rule, and note what depends on the examples."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tape = self.tape
        given = list(tensors_in(args))
        if kwargs:
            given += tensors_in(kwargs.values())
        if not tape.low and given and _autocast(given[0].device.type):
            tape.low = True
        roots = [t for t in given if tape.is_root(t)]
        if not roots:
            out = func(*args, **kwargs)
            if isinstance(out, Tensor):
                self._mark(out, given)
                if getattr(func, "__name__", "") in REMADE:
                    note(out, func, args, kwargs)
            elif isinstance(out, tuple | list):
                for part in out:
                    if isinstance(part, Tensor):
                        self._mark(part, given)
            return out
        name = getattr(func, "__name__", "")
        if any(tape.holds_examples(t) for t in given):
            return RULES.get(name, one_by_one)(tape, func, args, kwargs)
        if name in _EXPANSIONS and (lifted := expand_rule(tape, func, args, kwargs)) is not None:
            return lifted
        return self._compute(func, args, kwargs, roots)

    def _mark(self, out: Tensor, given: list[Tensor]) -> None:
        if not out.requires_grad:
            self.tape.mark(out, any(self.tape.holds_examples(t) for t in given))

    def _compute(self, func: Any, args: Any, kwargs: Any, roots: list[Tensor]) -> Any:
        """Compute from parameters alone, starting at their stand-ins."""
        tape = self.tape

        def alias(value: Any) -> Any:
            if isinstance(value, tuple | list) and not isinstance(value, torch.Size):
                return type(value)(alias(v) for v in value)
            if isinstance(value, Tensor) and tape.is_root(value):
                return tape.alias(value)
            return value

        out = func(*map(alias, args), **{k: alias(v) for k, v in kwargs.items()})
        names = "|".join(dict.fromkeys(n for r in roots for n in tape.name(r).split("|")))
        for part in (out,) if isinstance(out, Tensor) else tensors_in((out,)):
            if part.requires_grad:
                tape.add_computed(part, names)
            else:
                tape.mark(part, False)
        return out


@dataclass
class Clipped:
    """Sums of clipped gradients by parameter name, and the norms before clipping, (batch,)."""

    sums: dict[str, Tensor]
    norms: Tensor


def clipped_sum(
    tape: Tape, clip: float, *, clipping: Clipping = "flat", scale: float = 1.0,
    real: int | None = None,
) -> Clipped:  # fmt: skip
    """Clip each example's gradient to `clip` in the 2-norm over all parameters, and add up.

    Args:
        clipping: How, as `clipping_factors` has it.
        scale: Factor from what backward saw to one example's own gradient (the batch size, when
            the loss was a mean).
        real: How many of the first examples count; the rest is padding.
    """
    with full_precision(tape.device):
        return _clipped_sum(tape, clip, clipping, scale, real)


def _clipped_sum(
    tape: Tape, clip: float, clipping: Clipping, scale: float, real: int | None
) -> Clipped:
    uses = tape.collect()
    if not uses:
        tape.close()
        return Clipped({}, torch.zeros(tape.batch))
    squares = {name: use.squared_norms() for name, use in uses.items()}
    wide = torch.promote_types(next(iter(squares.values())).dtype, torch.float32)
    each = {name: s.to(wide).sqrt() * scale for name, s in squares.items()}
    norms = joint_norm(each.values())
    counts = torch.isfinite(norms)  # an example whose gradient overflowed contributes nothing
    if not bool(counts.all()):
        for use in uses.values():
            use.scrub(counts)
    if real is not None:
        counts[real:] = False
    factors = clipping_factors(each, clip, clipping, (name for name, _ in tape.parameters()))
    tape.close()
    sums = {}
    for name in list(uses):  # each use is dropped once it is summed, to keep the peak low
        weights = torch.where(counts, factors[name] * scale, 0.0)
        sums[name] = uses.pop(name).weighted(weights)
    return Clipped(sums, norms)


def refuse_float16(model: nn.Module) -> None:
    """Raise Incompatible under float16 autocast, which needs a scaled loss."""
    _autocast(next((p.device.type for p in model.parameters()), "cpu"))


def _autocast(kind: str) -> bool:
    """Whether operations on a kind of device run in lower precision here; refuse float16."""
    if not torch.is_autocast_enabled(kind):
        return False
    if torch.get_autocast_dtype(kind) == torch.float16:
        raise Incompatible(
            "Expected float32 or bfloat16 autocast, got float16: its gradients need a GradScaler, "
            "whose scale would change what is clipped. Use torch.autocast(device, torch.bfloat16)."
        )
    return True


Kind = tuple[int, frozenset[tuple[str, str]]]
_COMPARED: weakref.WeakKeyDictionary[nn.Module, set[Kind]] = weakref.WeakKeyDictionary()


def structure(model: nn.Module, *, without: type[nn.Module] | tuple[()] = ()) -> int:
    """Return a number that changes with the layers of a model, their modes and their hooks.

    Args:
        without: Modules of this type do not count.
    """
    globals_ = nn.modules.module
    parts: list[Any] = [
        _codes(globals_._global_forward_hooks), _codes(globals_._global_forward_pre_hooks)
    ]  # fmt: skip
    for module in (m for m in model.modules() if not isinstance(m, without)):
        parts.append((type(module), module.training, id(module.__dict__.get("forward"))))
        kinds = (
            module._forward_hooks, module._forward_pre_hooks,
            module._backward_hooks, module._backward_pre_hooks,
        )  # fmt: skip
        parts += [(i, _codes(hooks)) for i, hooks in enumerate(kinds) if hooks]
    return hash(tuple(parts))


def _codes(hooks: Mapping[int, Any]) -> tuple[int, ...]:
    functions = (getattr(hook, "__func__", hook) for hook in hooks.values())
    return tuple(id(getattr(f, "__code__", type(f))) for f in functions)


class Engine:
    """Records passes. It holds settings only, never tensors of a model."""

    accumulates: ClassVar[bool] = False
    """Whether a recorded pass leaves plain gradients at the parameters, which the step drops."""

    def __init__(self, *, check: bool = True) -> None:
        self.check = check

    @contextmanager
    def watch(self, model: nn.Module, images: Tensor) -> Iterator[Tape]:
        """Record the forward pass of `images` inside the block."""
        tape = self.tape(model, len(images))
        tape.mark(images, True)
        with Watch(tape):
            yield tape

    def tape(self, model: nn.Module, batch: int) -> Tape:
        """Return an empty tape for a model."""
        refuse_float16(model)
        trainable = {k: p for k, p in model.named_parameters() if p.requires_grad}
        frozen = [p for p in model.parameters() if not p.requires_grad]
        constants = frozenset(map(id, (*frozen, *model.buffers())))
        return Tape(trainable, batch, constants)

    def close(self) -> None:
        """Leave nothing on the model of a pass that was not clipped."""

    def verify(
        self, model: nn.Module, tape: Tape, outputs: Any, images: Tensor | None = None
    ) -> None:
        """Compare recorded gradients with plain ones, once for each kind of pass of a model.

        A pass of one example proves nothing of a model that mixes examples: it is not remembered.

        Args:
            outputs: What the model returned: the examples along the first dimension.
            images: Input that requires a gradient, to see whether examples mix.

        Raises:
            Incompatible: They differ, so the record of this model would be wrong.
        """
        if not self.check:
            return
        kind = (structure(model), frozenset(tape.signature))
        known = _COMPARED.setdefault(model, set())
        if kind not in known:
            _compare(tape, outputs, images)
            if tape.batch > 1:
                known.add(kind)


def _compare(tape: Tape, outputs: Any, images: Tensor | None) -> None:
    values = pseudo_losses(outputs, tape.batch)
    roots = tape.entered()
    if not roots:
        raise Unprotected(
            "Expected a forward pass whose use of trainable parameters can be followed, got none. "
            "Unfreeze what is trained: parameter.requires_grad_(True). A torch.autograd.Function "
            "of one's own hides them (LoHa and OFT of PEFT): use LoRA."
        )
    chosen = sorted({0, tape.batch // 2, tape.batch - 1})
    tape.checking = True
    expected_gradients = {i: _plain(tape, values[i], images, i) for i in chosen}
    tape.checking = False
    leaves = [r.leaf for r in roots]
    torch.autograd.grad(values.sum(), leaves, retain_graph=True, allow_unused=True)
    exact = values.dtype == torch.float64
    tolerance = 3e-2 if tape.low else 1e-9 if exact else 1e-3
    with full_precision(tape.device):
        _agree(tape, expected_gradients, values, tolerance)


def _agree(
    tape: Tape, wanted: dict[int, dict[str, Tensor]], values: Tensor, tolerance: float
) -> None:
    """Raise Incompatible where what the tape holds is not the plain gradient of an example."""
    uses = tape.collect()
    tape.forget()
    norms = torch.stack([u.squared_norms().to(values.dtype) for u in uses.values()]).sum(0).sqrt()
    for i, plain in wanted.items():
        only = torch.zeros(tape.batch, dtype=values.dtype, device=values.device)
        only[i] = 1
        size = torch.stack([g.norm() for g in plain.values()]).norm()
        if not bool(torch.isfinite(size)):
            continue  # the clipped sum leaves such an example out
        if not bool((norms[i] - size).abs() <= tolerance * size + 1e-30):
            raise _mismatch("the norm", i)
        for name, gradient in plain.items():
            got = uses[name].weighted(only) if name in uses else torch.zeros_like(gradient)
            if not bool((got - gradient).norm() <= tolerance * (gradient.norm() + 1e-2 * size)):
                raise _mismatch(name, i)


def _mismatch(what: str, example: int) -> Incompatible:
    return Incompatible(
        f"Expected each example's gradient to depend on that example alone, got another {what} for "
        f"example {example}. The model mixes examples (batch statistics?) or lays them out in an "
        "unknown way; differential privacy cannot hold for it."
    )


def pseudo_losses(outputs: Any, batch: int) -> Tensor:
    """Return a random linear function of each example's outputs, shape (batch,)."""
    generator = torch.Generator().manual_seed(0)
    total: Any = 0
    for out in tree_leaves(outputs):
        if isinstance(out, Tensor) and out.requires_grad and out.dim() and out.shape[0] == batch:
            flat = out.flatten(1) if out.dim() > 1 else out[:, None]
            wide = torch.promote_types(flat.dtype, torch.float32)
            weights = torch.randn(flat.shape[1], generator=generator).to(flat.device, wide)
            total = total + flat.to(wide) @ weights
    if not isinstance(total, Tensor):
        raise Unprotected("Expected outputs with a row for each example, got none.")
    return total


def _plain(tape: Tape, loss: Tensor, images: Tensor | None, example: int) -> dict[str, Tensor]:
    """Return the plain gradient of one example's loss by parameter name."""
    roots = tape.entered()
    leaves = [r.leaf for r in roots] + ([] if images is None else [images])
    found = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
    if images is not None and found[-1] is not None:
        others = found[-1].clone()
        others[example] = 0
        if bool(others.any()):
            raise _mismatch("image", example)
    total: dict[str, Tensor] = {}
    stand_ins = tape.leaves()
    for root, gradient in zip(roots, found, strict=False):
        if gradient is None:
            continue
        if root.source is None:
            pulled = {root.name: gradient}
        else:
            names = [n for n in root.name.split("|") if n in stand_ins]
            parts = torch.autograd.grad(
                root.source, [stand_ins[n] for n in names], gradient,
                retain_graph=True, allow_unused=True,
            )  # fmt: skip
            pulled = {n: p for n, p in zip(names, parts, strict=True) if p is not None}
        for name, part in pulled.items():
            total[name] = total[name] + part if name in total else part.to(tape.dtype_of(name))
    return total
