"""What one forward and backward pass leaves behind: each example's own gradient, book-kept.

A *root* is a leaf that stands for a parameter, or for a tensor computed from parameters alone
(a bias table looked up, three biases joined). Every meeting of a root with the examples leaves a
*use*: its gradient by example, either formed (`Samples`), as a product not yet formed
(`Products`), or as rows of a tensor that has a row for each example (`Slots`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vitguard.errors import Unprotected

__all__ = [
    "Products",
    "Root",
    "Samples",
    "Slots",
    "Tape",
    "full_precision",
    "prefer_products",
]


_CANCELLED = 1e-3  # of the square of the sum of the positions' norms; tokens at random are above


def full_precision(device: torch.device) -> torch.autocast:
    """Return a block without autocast: norms and sums keep the precision of the parameters."""
    return torch.autocast(device.type, enabled=False)


@dataclass
class Samples:
    """Formed gradients, shape (batch, *root.shape)."""

    values: Tensor

    def squared_norms(self) -> Tensor:
        flat = self.values.flatten(1)
        return torch.linalg.vector_norm(flat, dim=1).square()

    def samples(self) -> Tensor:
        return self.values

    def along(self, direction: Tensor) -> Tensor:
        """Return each example's product with a tensor of the root's shape, (batch,)."""
        return self.values.flatten(1) @ direction.flatten()

    def weighted(self, weights: Tensor) -> Tensor:
        flat = self.values.flatten(1)
        return (weights.to(flat.dtype) @ flat).view(self.values.shape[1:])

    def scrub(self, good: Tensor) -> None:
        keep = good.view(-1, *[1] * (self.values.dim() - 1))
        self.values = torch.where(keep, self.values, torch.zeros_like(self.values))


@dataclass
class Products:
    """Gradients of a matrix kept as factors: example i has `outputs[i].T @ inputs[i]`.

    Args:
        inputs: Shape (batch, positions, columns).
        outputs: Gradient at the layer's output, shape (batch, positions, rows).
        shape: Shape of the root, rows first.
    """

    inputs: Tensor
    outputs: Tensor
    shape: torch.Size

    def squared_norms(self) -> Tensor:
        """Return each squared norm from the two Gram matrices (Goodfellow, arXiv:1510.01799)."""
        if self.inputs.shape[1] == 1:
            x, g = self.inputs[:, 0], self.outputs[:, 0]
            return x.square().sum(1) * g.square().sum(1)
        grams = torch.bmm(self.inputs, self.inputs.mT)
        grams.mul_(torch.bmm(self.outputs, self.outputs.mT))
        sums = grams.sum((1, 2))
        # What is left where positions cancel is rounding: there the gradient is formed.
        most = grams.diagonal(dim1=1, dim2=2).sqrt().sum(1).square()
        for i in ((most > 0) & (sums <= _CANCELLED * most)).nonzero()[:, 0].tolist():
            formed = self.outputs[i].mT @ self.inputs[i]
            sums[i] = torch.linalg.vector_norm(formed).square()
        return sums

    def along(self, direction: Tensor) -> Tensor:
        matrix = direction.view(self.outputs.shape[2], self.inputs.shape[2])
        return (self.inputs @ matrix.T).mul_(self.outputs).sum((1, 2))

    def samples(self) -> Tensor:
        return torch.bmm(self.outputs.mT, self.inputs).view(-1, *self.shape)

    def weighted(self, weights: Tensor) -> Tensor:
        x, g = self.inputs, self.outputs
        factors = weights.to(g.dtype)[:, None, None]
        if x.shape[2] < g.shape[2]:  # never in place: a residual stream shares its gradient
            x = x * factors
        else:
            g = g * factors
        return (g.flatten(0, 1).mT @ x.flatten(0, 1)).view(self.shape)

    def scrub(self, good: Tensor) -> None:
        keep = good[:, None, None]
        self.inputs = torch.where(keep, self.inputs, torch.zeros_like(self.inputs))
        self.outputs = torch.where(keep, self.outputs, torch.zeros_like(self.outputs))


@dataclass
class Slots:
    """Cotangent of a computed root that has its own rows for each example: row block i is i's."""

    rows: Tensor


def prefer_products(positions: int, rows: int, columns: int) -> bool:
    """Whether the factors of a (rows, columns) gradient are cheaper to keep than the gradient.

    The Gram matrices cost positions^2 (rows + columns) multiplications; the formed gradient is
    made in place of the plain one, and costs passes over its rows * columns memory.
    """
    return positions * (rows + columns) < rows * columns


@dataclass
class Root:
    """A leaf of the recorded graph; `source` is the computed tensor it stands for, if any."""

    name: str
    leaf: Tensor
    source: Tensor | None = None
    entries: int = 0
    uses: list[Samples | Products | Slots] = field(default_factory=list)


class Tape:
    """The record of one pass over a batch.

    Args:
        parameters: Trainable parameters by name.
        batch: Number of examples.
        constants: The ids of the model's buffers and frozen parameters.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        batch: int,
        constants: frozenset[int] = frozenset(),
    ) -> None:
        self.batch = batch
        self._constants = constants
        self.checking = False
        self.closed = False
        """Whether the step was taken: a backward pass from now on would be lost."""
        self.thin = True
        """Whether every layer so far had a gradient at few positions only."""
        self.low = False
        """Whether operations of the pass ran under autocast, which may begin inside the model."""
        self.signature: set[tuple[str, str]] = set()
        self._parameters = {id(p): (name, p) for name, p in parameters.items()}
        self._computed: dict[int, Tensor] = {}
        self._roots: dict[int, Root] = {}
        self.computed_names: dict[int, str] = {}

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next((p.device for _, p in self._parameters.values()), torch.device("cpu"))

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the trainable parameters of the pass with their names."""
        yield from self._parameters.values()

    def is_root(self, tensor: Tensor) -> bool:
        """Whether `tensor` is a trainable parameter or was computed from such alone."""
        key = id(tensor)
        return key in self._parameters or key in self._computed

    def mark(self, tensor: Tensor, holds_examples: bool) -> None:
        """Note whether a tensor that needs no gradient depends on the examples."""
        tensor._vitguard_pass = (id(self), holds_examples)  # type: ignore[attr-defined]

    def holds_examples(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on the examples; one of unknown origin by its first dimension.

        What needs a gradient and was not computed from parameters alone does depend on them.
        """
        if self.is_root(tensor) or id(tensor) in self._constants:
            return False
        if tensor.requires_grad:
            return True
        known = getattr(tensor, "_vitguard_pass", (0, False))
        if known[0] == id(self):
            return known[1]
        return tensor.dim() > 0 and tensor.shape[0] > 0 and tensor.shape[0] % self.batch == 0

    def alias(self, tensor: Tensor) -> Tensor:
        """Return the stand-in that computations from parameters alone start at."""
        return self.root(tensor).leaf if id(tensor) in self._parameters else tensor

    def add_computed(self, tensor: Tensor, name: str) -> None:
        """Remember a tensor computed from parameters alone."""
        self._computed[id(tensor)] = tensor
        self.computed_names[id(tensor)] = name

    def name(self, tensor: Tensor) -> str:
        """Return the parameter's name, or the names of those a tensor was computed from."""
        known = self._parameters.get(id(tensor))
        return known[0] if known else self.computed_names.get(id(tensor), "")

    def root(self, tensor: Tensor) -> Root:
        """Return the root for a parameter or a computed tensor, made on first need."""
        key = id(tensor)
        if key not in self._roots:
            source = None if key in self._parameters else tensor
            leaf = tensor.detach().requires_grad_()
            self._roots[key] = Root(self.name(tensor), leaf, source)
        return self._roots[key]

    def enter(self, tensor: Tensor, rule: str) -> Root:
        """Note that a root meets the examples under a rule."""
        root = self.root(tensor)
        root.entries += 1
        self.signature.add((root.name, rule))
        return root

    def leaves(self) -> dict[str, Tensor]:
        """Return the stand-ins of the parameters that the pass used, by parameter name."""
        return {r.name: r.leaf for r in self._roots.values() if r.source is None}

    def entered(self) -> list[Root]:
        """Return every root that met the examples."""
        return [r for r in self._roots.values() if r.entries]

    def collect(self) -> dict[str, Samples | Products]:
        """Return one use for each parameter; several uses are formed and added up."""
        self._resolve_computed()
        found: dict[str, Samples | Products] = {}
        for root in self._roots.values():
            if root.source is not None or not root.uses:
                continue
            uses = [u for u in root.uses if not isinstance(u, Slots)]
            if len(uses) != len(root.uses):
                raise Unprotected(f"{root.name} has a row for each example; it cannot be private.")
            if len(uses) > 1:
                total = uses[0].samples().clone()
                for use in uses[1:]:
                    total += use.samples()
                uses = [Samples(total)]
            found[root.name] = uses[0]
        return found

    def dtype_of(self, name: str) -> torch.dtype:
        """Return a parameter's dtype, by name."""
        return next(r.leaf.dtype for r in self._roots.values() if r.name == name)

    def forget(self) -> None:
        """Drop the uses, keep the graph: the next backward pass records afresh."""
        self.thin = True
        for root in self._roots.values():
            root.uses.clear()

    def close(self) -> None:
        """Take no more: the step was taken, or its batch was left out."""
        self.closed = True
        self.forget()

    def leak(self) -> str | None:
        """Return a parameter that got a gradient around the record, if any."""
        plain = (name for name, p in self._parameters.values() if p.grad is not None)
        computed = (r.name for r in self._roots.values() if r.leaf.grad is not None)
        return next(plain, next(computed, None))

    def _resolve_computed(self) -> None:
        """Carry the cotangents of computed roots on to the parameters behind them."""
        parameters = [r for r in self._roots.values() if r.source is None]
        for root in self._roots.values():
            if root.source is None or not root.uses:
                continue
            targets = [r for r in parameters if r.name in root.name.split("|")]
            slots = [u for u in root.uses if isinstance(u, Slots)]
            whole = [u for u in root.uses if not isinstance(u, Slots)]
            root.uses.clear()
            for part in (whole, slots):
                if not part:
                    continue
                for target, gradient in zip(targets, self._pull(root, targets, part), strict=True):
                    if gradient is not None:
                        target.uses.append(Samples(gradient))

    def _pull(self, root: Root, targets: list[Root], uses: list[Any]) -> list[Tensor | None]:
        """Return each example's gradient at `targets` for the uses of a computed root."""
        leaves = [t.leaf for t in targets]
        assert root.source is not None
        if not isinstance(uses[0], Slots):
            cotangents = functools.reduce(torch.add, [u.samples() for u in uses])
            try:
                return list(
                    torch.autograd.grad(
                        root.source, leaves, cotangents, retain_graph=True, allow_unused=True,
                        is_grads_batched=True,
                    )
                )  # fmt: skip
            except RuntimeError:  # an operation without a batching rule
                return self._pull_each(root.source, leaves, cotangents)
        rows = functools.reduce(torch.add, [u.rows for u in uses])
        return self._pull_each(root.source, leaves, self._one_block_each(rows))

    def _pull_each(
        self, source: Tensor, leaves: list[Tensor], cotangents: Iterable[Tensor]
    ) -> list[Tensor | None]:
        found = [
            torch.autograd.grad(source, leaves, c, retain_graph=True, allow_unused=True)
            for c in cotangents
        ]
        return [
            None if column[0] is None else torch.stack(list(column))  # type: ignore[arg-type]
            for column in zip(*found, strict=True)
        ]

    def _one_block_each(self, rows: Tensor) -> Iterator[Tensor]:
        """Yield, for each example, the rows with all but its own set to zero."""
        per = rows.shape[0] // self.batch
        for i in range(self.batch):
            own = torch.zeros_like(rows)
            own[i * per : (i + 1) * per] = rows[i * per : (i + 1) * per]
            yield own
