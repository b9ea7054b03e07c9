"""Hypothesis strategies for encrypted messages and what may become of them on their way.

from hypothesis import given
from vitguard.testing import messages

@given(messages.encrypted().flatmap(lambda m: messages.mutated(m.data).map(lambda d: (m, d))))
def test_a_changed_message_is_refused(case):
    message, changed = case
    with pytest.raises(Rejected):
        message.aggregator().add(changed)
"""

from __future__ import annotations

import functools
import hashlib
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from vitguard.defenses.encryption import Aggregator, Encryptor, KeySet, Manifest, SigningKey
from vitguard.defenses.encryption import wire as _wire

__all__ = ["EncryptedMessage", "encrypted", "forged", "mutated"]

Draw = Callable[..., Any]
"""Hypothesis's `DrawFn`, which cannot be checked while a program runs."""

_CLIENTS = ("a", "b", "c")
_PROOF = 32  # bytes of a client's authentication code
_ODD = (0, 1, 2, 255, 2**16 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)


@dataclass(frozen=True)
class EncryptedMessage:
    """One client's message and what belongs to it.

    Args:
        data: The message as it is sent.
        values: What is in it, by name.
        client: Who sent it.
        round_id: The round that it is of.
        keys, manifest, signing: Those of the run; keys of all clients.
    """

    data: bytes
    values: dict[str, Tensor]
    client: str
    round_id: int
    keys: KeySet = field(repr=False)
    manifest: Manifest = field(repr=False)
    signing: SigningKey = field(repr=False)

    def aggregator(self) -> Aggregator:
        """Return a fresh aggregator of the run and the round."""
        return Aggregator(
            self.keys.for_server(), self.manifest, signing=self.signing, round_id=self.round_id
        )


@functools.cache
def _run() -> tuple[KeySet, Manifest, SigningKey]:
    """Return keys and manifest of a run; made once, since keys take long."""
    signing = SigningKey.generate()
    keys = KeySet.generate(server=signing.public_bytes())
    shape = {"w": torch.zeros(3, 2), "b": torch.zeros(())}
    return keys, Manifest.of(shape, bounds=1.0, max_weight=4.0), signing


@st.composite
def encrypted(draw: Draw) -> EncryptedMessage:
    """Honest messages of two small tensors, by three clients, in rounds 0 to 3."""
    keys, manifest, signing = _run()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    values = {e.name: torch.rand(e.shape, generator=generator) * 2 - 1 for e in manifest.entries}
    client, round_id = draw(st.sampled_from(_CLIENTS)), draw(st.integers(0, 3))
    encryptor = Encryptor(keys, manifest, client_id=client, rounding="nearest")
    weight = draw(st.sampled_from((1.0, 0.5, 4.0)))
    data = encryptor.encrypt(values, round_id=round_id, weight=weight)
    return EncryptedMessage(data, values, client, round_id, keys, manifest, signing)


def mutated(data: bytes) -> SearchStrategy[bytes]:
    """The bytes with one fault, never as they were: of a field of the header, or anywhere.

    A bit is flipped, a part cut, zeroed, doubled, moved or made up, or the end is missing.
    """
    return _faults().map(lambda fault: fault(data)).filter(lambda changed: changed != data)


def forged(message: EncryptedMessage) -> SearchStrategy[bytes]:
    """The message with one fault and a right authentication code: what an insider can send."""
    body = message.data[:-_PROOF]

    def signed(changed: bytes) -> bytes:
        digest = hashlib.sha256(changed).digest()
        return changed + message.keys.authority.code(message.client, digest)

    return mutated(body).map(signed)


def _faults() -> SearchStrategy[Callable[[bytes], bytes]]:
    """Faults that know nothing of the bytes: how long they are differs from run to run."""
    share = st.floats(0, 1, exclude_max=True)
    places = {
        "bit": lambda d, at, k, new: _put(d, at, bytes([d[at] ^ 1 << k])),
        "end": lambda d, at, k, new: d[:at],
        "more": lambda d, at, k, new: d[:at] + (new or b"x") + d[at:],
        "zeros": lambda d, at, k, new: _put(d, at, bytes(min(8, len(d) - at))),
        "twice": lambda d, at, k, new: d[:at] + d[at : at + 64] * 2 + d[at + 64 :],
        "swapped": lambda d, at, k, new: d[at:] + d[:at],
    }
    anywhere = st.builds(
        lambda kind, part, k, new: lambda d: places[kind](d, int(part * len(d)), k, new),
        st.sampled_from(sorted(places)), share, st.integers(0, 7), st.binary(max_size=8),
    )  # fmt: skip
    numbers = st.builds(_field, st.sampled_from(_fields()), st.sampled_from(_ODD), st.floats())
    return st.one_of(anywhere, numbers)


def _field(place: tuple[int, int, bool], whole: int, number: float) -> Callable[[bytes], bytes]:
    """Return what puts another number into one field of the header."""
    start, size, floating = place
    new = struct.pack(">d", number) if floating else (whole % 256**size).to_bytes(size, "big")
    return lambda data: _put(data, start, new)


@functools.cache
def _fields() -> list[tuple[int, int, bool]]:
    """Return (offset, bytes, whether it is a floating-point number) of each field."""
    order, *_ = _wire._FIXED.format
    found, at = [], 0
    for code in re.findall(r"\d*[a-zA-Z]", _wire._FIXED.format[1:]):
        size = struct.calcsize(order + code)
        found.append((at, size, code.endswith("d")))
        at += size
    return found


def _put(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]
