"""Packing: values to bounded integers, integers to complex slots, and back.

One ciphertext carries `layout.values` integers and a canary in its last slot. On the way in,
integers are whole float64: a component is below 2^46, so nothing is rounded or has to be cast.
"""

from __future__ import annotations

import hashlib

import numpy as np
from jaxtyping import Complex, Float, Int

from vitguard.defenses.encryption.presets import Layout

__all__ = ["canary", "pack", "quantise", "unpack"]


def quantise(
    values: Float[np.ndarray, " values"],
    factor: float,
    levels: int,
    uniform: Float[np.ndarray, " values"] | None = None,
) -> Float[np.ndarray, " values"]:
    """Round `values * factor` to whole numbers in [-levels, levels].

    With `uniform` (draws from [0, 1)) the rounding is stochastic, so that its expectation is the
    value itself; without, it is to the nearest. Values must be finite and within their bounds.
    """
    scaled = np.multiply(values, factor, dtype=np.float64)
    if uniform is None:
        np.rint(scaled, out=scaled)
    else:
        scaled += uniform
        np.floor(scaled, out=scaled)
    return np.clip(scaled, -levels, levels, out=scaled)


def pack(
    integers: Float[np.ndarray, " values"], layout: Layout, mark: complex
) -> Complex[np.ndarray, " slots"]:
    """Return the slots of one ciphertext; missing values are zero, the last slot is `mark`."""
    if len(integers) < layout.values:
        integers = np.concatenate([integers, np.zeros(layout.values - len(integers))])
    fields = integers.reshape(layout.fields, -1)
    slots = np.empty(layout.slots, dtype=np.complex128)
    components = slots.view(np.float64)[:-2]
    components[:] = fields[-1]
    for field in fields[-2::-1] if layout.fields > 1 else ():
        components *= 1 << layout.radix_bits
        components += field
    slots[-1] = mark
    return slots


def unpack(
    slots: Complex[np.ndarray, " slots"], layout: Layout
) -> tuple[Int[np.ndarray, " values"], complex, float]:
    """Return the integers of a decrypted ciphertext, its canary, and the rounding distance.

    The distance is the root mean square of what rounding took away: at most 1/14 for a true
    decryption, 0.29 for noise. It is what is rounded that leaves, never the approximate slots.
    """
    raw = np.ascontiguousarray(slots, dtype=np.complex128).view(np.float64)
    whole = np.rint(raw)
    raw = raw - whole
    distance = float(np.sqrt(np.dot(raw, raw) / len(raw)))
    components = whole[:-2].astype(np.int64)  # slots are below 2^59 whatever was decrypted
    fields = np.empty((layout.fields, len(components)), dtype=np.int64)
    half = 1 << (layout.radix_bits - 1)
    for field in range(layout.fields - 1):
        components += half
        np.bitwise_and(components, 2 * half - 1, out=fields[field])
        fields[field] -= half
        components >>= layout.radix_bits  # the floor is right: what was added rounds up
    fields[-1] = components
    return fields.reshape(-1), complex(whole[-2], whole[-1]), distance


def canary(binding: bytes, chunk: int, layout: Layout) -> complex:
    """Return the known integers in the last slot of ciphertext number `chunk`.

    They depend on what the message is bound to, so that a wrong key, a ciphertext of another round
    or place, or a sum of another number of clients shows after decryption.
    """
    digest = hashlib.sha256(binding + chunk.to_bytes(8, "big")).digest()
    span = min(layout.levels, 1 << 12)
    real = 1 + int.from_bytes(digest[:8], "big") % span
    imaginary = 1 + int.from_bytes(digest[8:16], "big") % span
    return complex(real, imaginary)
