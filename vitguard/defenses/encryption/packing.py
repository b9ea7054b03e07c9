"""Packing: values to bounded integers, integers to complex slots, and back.

One ciphertext carries `layout.values` integers and a canary in its last slot.
"""

from __future__ import annotations

import hashlib

import numpy as np
from jaxtyping import Complex, Float, Int

from vitguard.defenses.encryption.presets import Layout

__all__ = ["canary", "pack", "quantise", "unpack"]


def quantise(
    values: Float[np.ndarray, " values"],
    step: Float[np.ndarray, " values"] | float,
    levels: int,
    uniform: Float[np.ndarray, " values"] | None = None,
) -> Int[np.ndarray, " values"]:
    """Round `values / step` to integers in [-levels, levels].

    With `uniform` (draws from [0, 1)) the rounding is stochastic, so that its expectation is the
    value itself; without, it is to the nearest. Values must be finite and within their bounds.
    """
    scaled = np.asarray(values, dtype=np.float64) / step
    whole = np.rint(scaled) if uniform is None else np.floor(scaled + uniform)
    return np.clip(whole, -levels, levels).astype(np.int64)


def pack(
    integers: Int[np.ndarray, " values"], layout: Layout, mark: complex
) -> Complex[np.ndarray, " slots"]:
    """Return the slots of one ciphertext; missing values are zero, the last slot is `mark`."""
    fields = np.zeros((layout.fields, 2 * (layout.slots - 1)), dtype=np.int64)
    fields.reshape(-1)[: len(integers)] = integers
    components = np.zeros(2 * layout.slots, dtype=np.int64)
    for field in reversed(range(layout.fields)):
        components[:-2] = (components[:-2] << layout.radix_bits) + fields[field]
    slots = components.astype(np.float64).view(np.complex128)
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
    distance = float(np.sqrt(np.mean((raw - whole) ** 2)))
    limit = 2.0**62
    components = np.clip(np.nan_to_num(whole[:-2]), -limit, limit).astype(np.int64)
    fields = np.empty((layout.fields, len(components)), dtype=np.int64)
    half = 1 << (layout.radix_bits - 1)
    for field in range(layout.fields):
        fields[field] = ((components + half) & (2 * half - 1)) - half
        components = (components - fields[field]) >> layout.radix_bits
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
