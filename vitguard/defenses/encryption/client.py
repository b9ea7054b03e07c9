"""The client's side: encrypt an update, decrypt the sum."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NoReturn, SupportsFloat, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from vitguard import rounds
from vitguard.core import Update, tensors_by_name
from vitguard.defenses.encryption.authority import check_id
from vitguard.defenses.encryption.backend import shared_engine
from vitguard.defenses.encryption.keys import KeySet, ServerKeys
from vitguard.defenses.encryption.manifest import LIGHTEST, Manifest, check_manifest
from vitguard.defenses.encryption.packing import canary, pack, quantise, unpack
from vitguard.defenses.encryption.wire import (
    MESSAGE,
    SUM,
    Context,
    Header,
    open_message,
    write_message,
)
from vitguard.draws import Draws
from vitguard.errors import Rejected, expected
from vitguard.numbers import plain_number

__all__ = ["Decryptor", "Encryptor", "worst_error"]

_PIECE = 1 << 17
_TRUE_DISTANCE = 0.15  # a true decryption is within 1/14, noise is at 0.29


def worst_error(
    bound: float,
    keys: KeySet | ServerKeys,
    weights: list[float],
    *,
    max_weight: float = 1.0,
    nearest: bool = False,
) -> float:
    """Return the largest possible error of a decrypted average, from quantisation alone.

    Each client errs by less than one step of `bound / levels`, half of one when rounding to the
    nearest; steps count as the heaviest weight does, and the sum is divided by all weights.

    Args:
        bound: Of the tensor, in the manifest.
        weights: Of the clients in the sum.
        max_weight: Of the manifest. The further the weights are below it, the larger the error.

    Raises:
        InputError: No weights, or some that no client of such a manifest may have.
    """
    if isinstance(bound, str) or not 0 < bound < math.inf:
        raise expected("a finite bound above 0", repr(bound)[:80])
    if not len(weights) or not all(0 < w < math.inf for w in weights):
        raise expected("finite weights above 0", repr(weights)[:80])
    if max(weights) > max_weight:
        raise expected(
            f"weights up to max_weight {max_weight}", max(weights),
            "Give the manifest's: max_weight=manifest.max_weight.",
        )  # fmt: skip
    step = bound / keys.layout.levels
    error = len(weights) * step * max_weight / math.fsum(weights)
    return error / 2 if nearest else error


@dataclass
class _Round:
    round_id: int
    weight: Any  # one number, however it is held
    base: str


class Encryptor:
    """Encrypts one client's updates.

    Args:
        keys: The client's keys.
        manifest: What is encrypted; the same for all clients and the server.
        client_id: Name of this client, 1 to 64 bytes; the server takes one message of each.
        outliers: What becomes of NaN, infinity and values beyond their bound: `refuse` raises,
            `clip` moves them to the bound (NaN to zero) and counts them in `clipped`.
        rounding: `stochastic` is unbiased; `nearest` has half the worst error.
        generator: Makes the rounding a function of its state, for tests; by default it is drawn
            from the operating system.

    The ciphertext needs no generator: SEAL draws a fresh seed for each from the system.
    """

    def __init__(
        self,
        keys: KeySet,
        manifest: Manifest,
        *,
        client_id: str,
        outliers: Outliers = "refuse",
        rounding: Literal["stochastic", "nearest"] = "stochastic",
        generator: torch.Generator | None = None,
    ) -> None:
        if outliers not in ("refuse", "clip"):
            raise expected("outliers 'refuse' or 'clip'", repr(outliers))
        if rounding not in ("stochastic", "nearest"):
            raise expected("rounding 'stochastic' or 'nearest'", repr(rounding))
        if not isinstance(keys, KeySet):
            raise expected("a client's keys", type(keys).__name__, "KeySet.load reads a file.")
        check_manifest(manifest)
        check_id(client_id)
        self.keys, self.manifest, self.client_id = keys, manifest, client_id
        self.outliers: Outliers = outliers
        self.rounding = rounding
        self.clipped: dict[str, int] = {}
        self._draws = Draws(generator)
        self._engine = shared_engine(keys.layout)
        self._sealer = self._engine.encryptor(keys.open(self._engine))
        self._round: _Round | None = None

    def __repr__(self) -> str:
        return f"Encryptor({self.client_id!r}, {len(self.manifest.entries)} tensors)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an encryptor holds keys and is not pickled: make it from KeySet.load")

    def __deepcopy__(self, memo: dict[int, Any]) -> Encryptor:
        return self

    def start_round(
        self, round_id: SupportsIndex, *, weight: SupportsFloat = 1.0, base: str = ""
    ) -> None:
        """Name the round that `encrypt` without arguments belongs to, for good.

        `Guard.round` names it for the messages of one block, which is harder to get wrong.
        """
        self._round = _Round(plain_number(round_id), weight, base)

    def encrypt(
        self,
        update: Update | Mapping[str, Any],
        *,
        round_id: int | None = None,
        weight: SupportsFloat | None = None,
        base: str | None = None,
    ) -> bytes:
        """Return the encrypted message for the server.

        Args:
            update: An update, or tensors or NumPy arrays by name; those of the manifest are read.
            round_id: Number of the round; default from `start_round`, then from `Guard.round`.
                Beside one of them it must be the same.
            weight: Weight in the average, up to the manifest's `max_weight`; it is public. Default
                from the round, 1 outside of one.
            base: Version of the public model that the update refers to (`model_version`). Default
                from the round, "" outside of one.

        Raises:
            Rejected: The tensors are not those of the manifest.
            InputError: A value is not finite or beyond its bound, and `outliers` is `refuse`.
        """
        now = self._settled(round_id, weight, base)
        now.weight = plain_number(now.weight)
        heaviest = self.manifest.max_weight
        number = isinstance(now.weight, int | float) and not isinstance(now.weight, bool)
        if not (number and 0 < now.weight <= heaviest):
            raise expected(f"a weight above 0 and up to {heaviest}", repr(now.weight)[:80])
        if now.weight < LIGHTEST * heaviest:
            raise expected(f"a weight of at least {LIGHTEST * heaviest:g}", now.weight)
        tensors = update.tensors if isinstance(update, Update) else tensors_by_name(update)
        self.manifest.check(tensors)
        context = Context(self.keys, self.manifest, now.round_id, now.base)
        self.clipped = {}
        binding, layout = context.binding(), self.keys.layout
        ciphertexts = []
        share = now.weight / self.manifest.max_weight
        for number, integers in enumerate(_regroup(self._integers(tensors, share), layout.values)):
            slots = pack(integers, layout, canary(binding, number, layout))
            ciphertexts.append(self._engine.encrypt(self._sealer, slots))
        header = Header(MESSAGE, self.client_id, 1, now.weight)
        prove = partial(self.keys.authority.code, self.client_id)
        return write_message(header, ciphertexts, context, prove)

    def seal(
        self,
        update: Update,
        *,
        round_id: int | None = None,
        weight: SupportsFloat | None = None,
        base: str | None = None,
    ) -> Update:
        """Return the update with the manifest's tensors sealed and the message as its payload."""
        message = self.encrypt(update, round_id=round_id, weight=weight, base=base)
        sealed = update.seal(dict.fromkeys(self.manifest.names, f"encrypted ({self.keys.preset})"))
        return replace(
            sealed,
            payloads={**sealed.payloads, "encryption": message},
            clipped={**sealed.clipped, **self.clipped},
        )

    def _settled(
        self, round_id: int | None, weight: SupportsFloat | None, base: str | None
    ) -> _Round:
        default = self._started(round_id)
        return _Round(
            default.round_id,
            default.weight if weight is None else weight,
            default.base if base is None else base,
        )

    def _started(self, round_id: int | None) -> _Round:
        """Return the round that `start_round` named, or the one that the block is bound to.

        A number given beside it must be the same: its weight and base would be lost in silence.
        """
        now, own = rounds.current(), self._round
        if now is not None and now.client not in ("", self.client_id):
            raise expected(
                f"a round of client {self.client_id!r}, whose encryptor this is", repr(now.client)
            )
        if now is not None and own is not None and (now.number, now.base) != (
            own.round_id, own.base,
        ):  # fmt: skip
            raise expected(
                f"one round, {now.number} by Guard.round", f"{own.round_id} by start_round",
                "Drop start_round.",
            )  # fmt: skip
        if own is None and now is not None:
            own = _Round(now.number, now.weight, now.base)
        if own is None and round_id is None:
            raise expected(
                "a round number", "none",
                "Make the update inside guard.round(...), give round_id=, or call start_round.",
            )  # fmt: skip
        if own is not None and round_id not in (None, own.round_id):
            raise expected(
                f"one round, {own.round_id} by {'start_round' if self._round else 'Guard.round'}",
                f"round_id={round_id!r:.80}", "Leave round_id out.",
            )  # fmt: skip
        return own or _Round(round_id, 1.0, "")  # type: ignore[arg-type]

    def _integers(self, tensors: Mapping[str, Tensor], share: float) -> Iterator[np.ndarray]:
        levels = self.keys.layout.levels
        for entry in self.manifest.entries:
            flat = tensors[entry.name].detach().cpu().reshape(-1)
            flat = flat if flat.dtype == torch.float64 else flat.float()
            for start in range(0, entry.size, _PIECE):
                values, count = entry.within(flat[start : start + _PIECE].numpy(), self.outliers)
                if count:
                    self.clipped[entry.name] = self.clipped.get(entry.name, 0) + count
                nearest = self.rounding == "nearest"
                uniform = None if nearest else self._draws.uniform(len(values))
                yield quantise(values, share * levels / entry.bound, levels, uniform)


class Decryptor:
    """Decrypts sums. Only rounded integers, scaled back, ever leave it. Thread-safe.

    Guarantees:
        A round is opened once and rounds only go forward, whatever threads do: two sums of one
        round that differ by a client would give that client's update away.
        A sum that the server did not sign is refused and leaves its round as it was.
        No value leaves that is beyond the bounds of the manifest, by more than rounding.

    Args:
        keys: The client's keys; they name the server (`KeySet.trusting`).
        manifest: What is encrypted.
        min_clients: The fewest messages of a sum that is opened, at least 2.
        opened: The last round of this run that was opened before, by another decryptor of these
            keys: `opened` of it, saved. -1 for none.
    """

    def __init__(
        self, keys: KeySet, manifest: Manifest, *, min_clients: int = 2, opened: int = -1
    ) -> None:
        if not isinstance(keys, KeySet):
            raise expected("a client's keys", type(keys).__name__)
        check_manifest(manifest)
        if keys.server is None:
            raise expected(
                "keys that name the server whose sums they open", "keys that name none",
                "Give its verification key: keys.trusting(signing.public_bytes()).",
            )  # fmt: skip
        if type(min_clients) is not int or not 2 <= min_clients <= keys.max_clients:
            raise expected(f"a whole min_clients from 2 to {keys.max_clients}", min_clients)
        if type(opened) is not int or opened < -1:
            raise expected("the number of the last round opened, or -1", opened)
        self.keys, self.manifest, self.min_clients = keys, manifest, min_clients
        self._engine = shared_engine(keys.layout)
        self._opener = self._engine.decryptor(keys.open(self._engine))
        self._opened = opened
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Decryptor({len(self.manifest.entries)} tensors, min_clients={self.min_clients})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a decryptor holds keys and is not pickled: make it from KeySet.load")

    def __deepcopy__(self, memo: dict[int, Any]) -> Decryptor:
        return self

    @property
    def opened(self) -> int:
        """The last round that was opened, -1 for none. Save it before the next `decrypt`."""
        return self._opened

    def decrypt(self, data: bytes, *, round_id: int, base: str = "") -> dict[str, Tensor]:
        """Return the weighted average by name, float32 (float64 where the tensors were).

        Args:
            data: What `Aggregator.finish` returned.
            round_id, base: What the sum must belong to.

        Raises:
            Rejected: The message does not hold, is of fewer than `min_clients` clients, of a round
                that was opened already, its canary shows a wrong key or a wrong sum, or a value
                is beyond its bound. Once the server's signature held, the round counts as opened.
        """
        context = Context(self.keys, self.manifest, round_id, base)
        header, ciphertexts = open_message(data, SUM, context)
        if header.clients < self.min_clients:
            raise Rejected("clients", f"a sum of {header.clients}, fewer than {self.min_clients}")
        with self._lock:  # marked before anything is decrypted
            if round_id <= self._opened:
                raise Rejected("replay", f"round {round_id} after round {self._opened}")
            self._opened = round_id
        unit = self.manifest.max_weight / header.weight / self.keys.layout.levels
        return _scatter(self._integers(ciphertexts, header, context), self.manifest, unit)

    def _integers(
        self, ciphertexts: list[memoryview], header: Header, context: Context
    ) -> Iterator[np.ndarray]:
        binding, layout = context.binding(), self.keys.layout
        largest = self._largest(header)
        for number, data in enumerate(ciphertexts):
            slots = self._engine.decrypt(self._opener, self._engine.load(data, seeded=False))
            integers, mark, distance = unpack(slots, layout)
            if not (distance <= _TRUE_DISTANCE) or mark != header.clients * canary(
                binding, number, layout
            ):
                raise Rejected(
                    "canary", "a sum under another secret key, or not of the messages it names"
                )
            if integers.max() > largest or integers.min() < -largest:
                raise Rejected("range", "a sum with values beyond the bounds of the manifest")
            yield integers

    def _largest(self, header: Header) -> int:
        """Return the largest integer of an honest sum: levels by weight, each client rounding."""
        levels = self.keys.layout.levels
        share = header.weight / self.manifest.max_weight
        return min(
            levels * header.clients, math.floor(share * levels * (1 + 1e-12)) + header.clients
        )


def _regroup(pieces: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Cut a stream of arrays into arrays of `size`, the last one shorter."""
    buffer, filled = np.empty(size), 0
    for piece in pieces:
        at = 0
        while at < len(piece):
            count = min(size - filled, len(piece) - at)
            buffer[filled : filled + count] = piece[at : at + count]
            filled, at = filled + count, at + count
            if filled == size:
                yield buffer
                filled = 0
    if filled:
        yield buffer[:filled]


def _scatter(chunks: Iterator[np.ndarray], manifest: Manifest, unit: float) -> dict[str, Tensor]:
    """Give each tensor its share of the stream of integers, in its own units."""
    tensors: dict[str, Tensor] = {}
    chunk, at = np.empty(0, dtype=np.int64), 0
    for entry in manifest.entries:
        values = np.empty(entry.size, dtype=np.float64 if entry.double else np.float32)
        filled = 0
        while filled < entry.size:
            if at == len(chunk):
                chunk, at = next(chunks), 0
            count = min(entry.size - filled, len(chunk) - at)
            values[filled : filled + count] = chunk[at : at + count] * (unit * entry.bound)
            filled, at = filled + count, at + count
        tensors[entry.name] = torch.from_numpy(values).reshape(entry.shape)
    return tensors
