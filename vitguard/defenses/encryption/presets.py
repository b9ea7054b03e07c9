"""Presets: the ring, the packing and the limits that fit together, and the numbers they imply.

The message of one component is `f0 + r f1 + r^2 f2 ...`: `fields` quantised integers of width
`log2 r`. A slot holds two components (real, imaginary). Everything is chosen so that the sum over
all clients stays inside the modulus and the noise stays below one half, hence integer sums are
exact; nothing of it can be set by a message.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vitguard.errors import expected

__all__ = ["PRESETS", "Layout", "Preset", "preset"]

_NOISE = 3.2  # standard deviation of SEAL's error distribution, per coefficient
_MARGIN = 14  # the unit is this many noise deviations, so that rounding errs beyond 7 of them
_TABLE = {2048: 54, 4096: 109, 8192: 218, 16384: 438}  # SEAL's 128-bit caps on all modulus bits


@dataclass(frozen=True)
class Layout:
    """What a preset means for a number of clients.

    Args:
        degree: Ring degree N; a ciphertext has N/2 slots.
        bits: Bits of the data prime and of the special prime.
        fields: Quantised integers in one component.
        scale_bits: log2 of the encoding scale.
        radix_bits: log2 of the radix r between fields.
        levels: A client's integers lie in [-levels, levels].
        clients: Messages that one sum may hold.
    """

    degree: int
    bits: tuple[int, int]
    fields: int
    scale_bits: int
    radix_bits: int
    levels: int
    clients: int

    @property
    def slots(self) -> int:
        """Slots of a ciphertext; the last one is the canary."""
        return self.degree // 2

    @property
    def values(self) -> int:
        """Values that one ciphertext carries."""
        return (self.slots - 1) * 2 * self.fields

    @property
    def scale(self) -> float:
        """Encoding scale."""
        return 2.0**self.scale_bits

    def chunks(self, values: int) -> int:
        """Ciphertexts that `values` values take."""
        return -(-values // self.values)


@dataclass(frozen=True)
class Preset:
    """A named trade of size, precision and number of clients, within SEAL's 128-bit table.

    Args:
        name: How settings and messages call it.
        degree, bits, fields: See `Layout`.
        client_limit: The most clients that `layout` accepts.
        bytes_up, bytes_down: Measured bytes a value, TenSEAL 0.3.18.
    """

    name: str
    degree: int
    bits: tuple[int, int]
    fields: int
    client_limit: int
    bytes_up: float
    bytes_down: float

    def __post_init__(self) -> None:
        cap = _TABLE.get(self.degree)
        if cap is None or sum(self.bits) > cap:
            raise expected(f"modulus bits within the 128-bit table {_TABLE}", self)

    def layout(self, max_clients: int) -> Layout:
        """Return the numbers for sums of up to `max_clients` messages.

        Raises:
            InputError: `max_clients` is no whole number, below 1 or above the preset's limit.
        """
        if type(max_clients) is not int:  # a key file would hold no other
            raise expected(
                f"a whole number of clients, 1 to {self.client_limit}", repr(max_clients)[:80]
            )
        if not 1 <= max_clients <= self.client_limit:
            raise expected(
                f"1 to {self.client_limit} clients for preset {self.name!r}",
                max_clients,
                "Preset 'many' takes up to 100, 'precise' up to 1000.",
            )
        noise = _NOISE * math.sqrt(self.degree / 2) * math.sqrt(max_clients)
        scale_bits = math.ceil(math.log2(_MARGIN * noise))
        # sqrt(2) r^F / 2 * scale <= 2^(bits - 1), less 1/16 for noise and for a prime below 2^bits
        room = self.bits[0] - 1 + math.log2(15 / 16) - scale_bits - 0.5
        radix_bits = math.floor((room + 1) / self.fields)
        levels = (2 ** (radix_bits - 1) - 1) // max_clients
        return Layout(
            self.degree, self.bits, self.fields, scale_bits, radix_bits, levels, max_clients
        )


PRESETS: dict[str, Preset] = {
    p.name: p
    for p in (
        Preset("quantised", 4096, (54, 20), 2, 10, 3.785, 7.54),
        Preset("many", 8192, (60, 20), 2, 100, 4.015, 8.02),
        Preset("precise", 4096, (54, 20), 1, 1000, 7.57, 15.08),
        Preset("compact", 8192, (60, 20), 3, 10, 2.677, 5.345),
    )
}


def preset(name: str) -> Preset:
    """Return the preset called `name`.

    Raises:
        InputError: There is none.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise expected(f"one of {', '.join(PRESETS)} as the preset", repr(name)[:80])
    return PRESETS[name]
