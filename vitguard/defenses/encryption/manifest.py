"""The manifest: which tensors are encrypted, in what shape and within which bounds.

All clients and the server of a run share one. Its digest is in every message, so that a model or a
selection that changed since is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from vitguard.errors import Rejected, expected

__all__ = ["Entry", "Manifest", "model_version"]


@dataclass(frozen=True)
class Entry:
    """One encrypted tensor: name, shape, and the bound of its absolute values."""

    name: str
    shape: tuple[int, ...]
    bound: float
    double: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.bound < math.inf:
            raise expected(f"a finite bound above 0 for {self.name}", self.bound)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Manifest:
    """What every party of a run agrees on before the first round.

    Args:
        entries: The encrypted tensors, in the order in which they are packed.
        max_weight: The largest weight of one client; values are scaled by weight / max_weight.
    """

    entries: tuple[Entry, ...]
    max_weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.entries:
            raise expected("at least one tensor to encrypt", "none")
        if len({e.name for e in self.entries}) != len(self.entries):
            raise expected("each tensor once in the manifest", "a name twice")
        if not 0 < self.max_weight < math.inf:
            raise expected("a finite max_weight above 0", self.max_weight)

    @staticmethod
    def of(
        tensors: Mapping[str, Tensor],
        names: Iterable[str] | None = None,
        *,
        bounds: float | Mapping[str, float],
        max_weight: float = 1.0,
    ) -> Manifest:
        """Describe `names` (default all) of `tensors`, such as a model's parameters.

        Args:
            bounds: The largest absolute value of an update, for all tensors or by name. Take it
                from clipping or from public data: it is sent in the clear.

        Raises:
            InputError: A name or a bound is missing.
        """
        entries = []
        for name in tensors if names is None else names:
            if name not in tensors:
                raise expected("a manifest of tensors that exist", repr(name))
            bound = bounds.get(name) if isinstance(bounds, Mapping) else bounds
            if bound is None:
                raise expected(f"a bound for {name}", "none")
            tensor = tensors[name]
            entries.append(
                Entry(name, tuple(tensor.shape), float(bound), tensor.dtype == torch.float64)
            )
        return Manifest(tuple(entries), max_weight)

    @property
    def values(self) -> int:
        """Number of encrypted values."""
        return sum(e.size for e in self.entries)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the encrypted tensors."""
        return tuple(e.name for e in self.entries)

    def to_json(self) -> str:
        """Return the manifest as canonical JSON."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Manifest:
        """Read what `to_json` wrote.

        Raises:
            InputError: It is no manifest.
        """
        try:
            data = json.loads(text)
            entries = tuple(
                Entry(str(e["name"]), tuple(map(int, e["shape"])), float(e["bound"]), e["double"])
                for e in data["entries"]
            )
            return Manifest(entries, float(data["max_weight"]))
        except (KeyError, TypeError, json.JSONDecodeError, AttributeError) as error:
            raise expected("a manifest as JSON", repr(error)) from error

    def digest(self) -> bytes:
        """Return 32 bytes that stand for the whole manifest."""
        return hashlib.sha256(self.to_json().encode()).digest()

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Refuse tensors that are not the ones described.

        Raises:
            Rejected: A tensor is missing, has another shape, or is no floating-point tensor.
        """
        for entry in self.entries:
            tensor = tensors.get(entry.name)
            if tensor is None:
                raise Rejected("manifest", f"an update without {entry.name}")
            if tuple(tensor.shape) != entry.shape:
                raise Rejected(
                    "manifest",
                    f"{entry.name} of shape {tuple(tensor.shape)} where the manifest says "
                    f"{entry.shape}: the model changed since it was made",
                )
            if not tensor.is_floating_point():
                raise Rejected("manifest", f"{entry.name} of type {tensor.dtype}")


def model_version(tensors: Mapping[str, Tensor]) -> str:
    """Return a hexadecimal name for public weights, such as `model.state_dict()`.

    A weight difference means something only beside the weights it was taken from, so each message
    names them; a client that skipped a round names others and is refused.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
