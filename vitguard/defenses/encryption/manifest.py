"""The manifest: which tensors are encrypted, in what shape and within which bounds.

All clients and the server of a run share one. Its digest is in every message, so that a model or a
selection that changed since is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal, SupportsFloat

import numpy as np
import torch
from torch import Tensor

from vitguard.core import tensors_by_name
from vitguard.errors import InputError, Rejected, expected
from vitguard.files import parsed_json
from vitguard.numbers import plain_number

__all__ = ["LIGHTEST", "Entry", "Manifest", "check_manifest", "model_version"]

Outliers = Literal["refuse", "clip"]
LIGHTEST = 2.0**-40
"""The smallest weight, as a share of the largest: every scale is finite."""
_SCALE = 1e30  # bounds and weights are within 1 / _SCALE and _SCALE
_MOST = 2**40  # values; more fit no message


@dataclass(frozen=True)
class Entry:
    """One encrypted tensor: name, shape, and the bound of its absolute values."""

    name: str
    shape: tuple[int, ...]
    bound: float
    double: bool = False

    def __post_init__(self) -> None:
        if type(self.name) is not str or not self.name:
            raise expected("the name of a tensor", repr(self.name)[:80])
        if type(self.shape) is not tuple or any(type(n) is not int or n < 0 for n in self.shape):
            raise expected(f"a shape of whole numbers for {self.name}", repr(self.shape)[:80])
        if type(self.double) is not bool:
            raise expected(f"double of {self.name} to be true or false", repr(self.double)[:80])
        _check_scale(f"bound of {self.name}", self.bound)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def within(self, values: np.ndarray, outliers: Outliers) -> tuple[np.ndarray, int]:
        """Return the values within the bound, and how many had to be moved there (NaN to zero).

        Raises:
            InputError: A value is not finite or beyond the bound, and `outliers` is `refuse`.
        """
        bound = values.dtype.type(self.bound)  # NumPy 1 would compare a float32 as a float64
        if -bound <= values.min() and values.max() <= bound:  # false for NaN
            return values, 0
        count = int((~(np.abs(values) <= bound)).sum())
        if outliers == "refuse":
            raise expected(
                f"finite values of {self.name} within its bound {self.bound:g}",
                f"{count} others",
                "Clip the update, raise the bound, or choose outliers='clip'.",
            )
        return np.clip(np.nan_to_num(values, nan=0.0), -bound, bound), count


@dataclass(frozen=True)
class Manifest:
    """What every party of a run agrees on before the first round.

    Args:
        entries: The encrypted tensors, in the order in which they are packed.
        max_weight: The largest weight of one client; values are scaled by weight / max_weight.
        run: Name of the run, drawn at random: messages of another run are refused, though the
            keys and all else may be the same.
    """

    entries: tuple[Entry, ...]
    max_weight: float = 1.0
    run: str = field(default_factory=lambda: secrets.token_hex(16))

    def __post_init__(self) -> None:
        if not self.entries:
            raise expected("at least one tensor to encrypt", "none")
        object.__setattr__(self, "entries", tuple(self.entries))  # its digest is kept
        if len({e.name for e in self.entries}) != len(self.entries):
            raise expected("each tensor once in the manifest", "a name twice")
        if not self.values <= _MOST:
            raise expected(f"up to {_MOST} values to encrypt", self.values)
        _check_scale("max_weight", self.max_weight)
        if type(self.run) is not str or not 0 < len(self.run) <= 64:
            raise expected("the name of a run, 1 to 64 characters", repr(self.run)[:80])

    @staticmethod
    def of(
        tensors: Mapping[str, Any],
        names: Iterable[str] | None = None,
        *,
        bounds: float | Mapping[str, float],
        max_weight: SupportsFloat = 1.0,
        run: str | None = None,
    ) -> Manifest:
        """Describe `names` of `tensors` (default all but integers), such as a model's parameters.

        One party makes the manifest and gives it to the others (`to_json`): its `run` is random.

        Args:
            bounds: The largest absolute value of an update, for all tensors or by name. Take it
                from clipping or from public data: it is sent in the clear.
            run: Name of the run; a fresh one by default. Never use one again.

        Raises:
            InputError: A name or a bound is missing.
        """
        tensors = tensors_by_name(tensors)
        if names is None:  # counters, such as those of batch norms, are not encrypted
            names = [n for n, t in tensors.items() if t.is_floating_point()]
        entries = []
        for name in names:
            if name not in tensors:
                raise expected("a manifest of tensors that exist", repr(name))
            bound = bounds.get(name) if isinstance(bounds, Mapping) else bounds
            if bound is None:
                raise expected(f"a bound for {name}", "none")
            bound = _number(name, bound)
            tensor = tensors[name]
            if not tensor.is_floating_point():
                raise expected(f"floating-point values to encrypt in {name}", tensor.dtype)
            entries.append(Entry(name, tuple(tensor.shape), bound, tensor.dtype == torch.float64))
        return Manifest(tuple(entries), plain_number(max_weight), run or secrets.token_hex(16))

    def new_run(self) -> Manifest:
        """Return the manifest of another run over the same tensors."""
        return replace(self, run=secrets.token_hex(16))

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
            InputError: It is no manifest, or one of an earlier version, without a run.
        """
        try:
            data = parsed_json(text)
            if "run" not in data:
                raise expected(
                    "a manifest that names its run", "one without",
                    "Make it again with Manifest.of and give it to all parties.",
                )  # fmt: skip
            entries = tuple(_entry(e) for e in data["entries"])
            return _exactly(Manifest, {**data, "entries": entries})
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise expected("a manifest as JSON", type(error).__name__) from error

    def digest(self) -> bytes:
        """Return 32 bytes that stand for the whole manifest."""
        return self._digest

    @cached_property
    def _digest(self) -> bytes:
        return hashlib.sha256(self.to_json().encode()).digest()

    def difference(self, names: Iterable[str]) -> str:
        """Return what the manifest names too much and too little beside `names`, "" if nothing."""
        wanted = set(names)
        return ", ".join(
            f"{word} {', '.join(sorted(found)[:3])}{' ...' if len(found) > 3 else ''}"
            for word, found in (
                ("without", wanted - set(self.names)), ("with", set(self.names) - wanted),
            )
            if found
        )  # fmt: skip

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
            if tensor.dtype not in _KINDS or tensor.layout != torch.strided or tensor.is_meta:
                kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
                raise Rejected("manifest", f"{entry.name} of type {kind}")


def check_manifest(given: object) -> Manifest:
    """Return a manifest if it is one.

    Raises:
        InputError: It is something else, such as its JSON.
    """
    if not isinstance(given, Manifest):
        raise expected(
            "a Manifest", type(given).__name__,
            "Manifest.of makes one, Manifest.from_json reads its text.",
        )  # fmt: skip
    return given


_KINDS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _entry(stored: dict[str, Any]) -> Entry:
    if type(stored["shape"]) is not list:
        raise TypeError("a shape that is no list")
    return _exactly(Entry, {**stored, "shape": tuple(stored["shape"])})


def _exactly(kind: Any, stored: dict[str, Any]) -> Any:
    """Make a dataclass of all its fields: a default would be said by nobody."""
    if stored.keys() != {f.name for f in fields(kind)}:
        raise KeyError(f"other fields than those of {kind.__name__}")
    return kind(**stored)


def _number(name: str, bound: Any) -> float:
    """Return a bound as Python's own number, of a tensor or array of just one as well."""
    bound = plain_number(bound)
    if type(bound) not in (int, float):
        raise expected(f"a number as the bound of {name}", repr(bound)[:80])
    return float(bound)


def _check_scale(what: str, number: object) -> None:
    if type(number) not in (int, float) or not 1 / _SCALE <= number <= _SCALE:  # type: ignore
        raise expected(f"a finite {what} from {1 / _SCALE:g} to {_SCALE:g}", repr(number)[:80])


def model_version(tensors: Mapping[str, Any]) -> str:
    """Return a hexadecimal name for public weights, such as `model.state_dict()`.

    A weight difference means something only beside the weights it was taken from, so each message
    names them; a client that skipped a round names others and is refused.

    Args:
        tensors: Tensors or NumPy arrays by name; the same values give the same version.

    Raises:
        InputError: They are something else, sparse, or without values (meta).
    """
    digest = hashlib.sha256()
    tensors = tensors_by_name(tensors)
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        if tensor.layout != torch.strided or tensor.is_meta:
            raise expected(
                f"{name} as a dense tensor with values", f"{tensor.layout}, on {tensor.device}"
            )
        tensor = tensor.cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        if tensor.numel():  # an empty one that NumPy made has no stride to read bytes by
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
