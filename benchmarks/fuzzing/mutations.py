"""Mutations: of bytes, of JSON, of safetensors files; and the one fault that is looked for."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

import numpy as np

__all__ = ["COUNTS", "FLOATS", "Chance", "Fault", "changed_safetensors", "plainly"]

FLOATS = (float("nan"), float("inf"), -float("inf"), -1.0, 0.0, -0.0, 1e308, 5e-324, 2.0, 0.5)
COUNTS = (0, 1, 2, 3, 7, 255, 2**15, 2**16 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
DEEP, HUGE = "@deep@", "@huge@"  # what json.dumps would not write
ODD = (
    None, True, False, -1, 0, 1, 2, 0.5, -0.0, 1e308, 2**31, 2**63, 10**400, "", "x", "x" * 100,
    "\ud800", "\0", [], {}, [[]], {"a": 1}, DEEP, HUGE, *FLOATS[:3],
)  # fmt: skip


class Chance(random.Random):
    """The mutations that know nothing of a format, and those of JSON."""

    def flip(self, data: bytes, donors: list[bytes]) -> bytes:
        """Change bytes: flip, cut, insert, zero, repeat, swap sections, join with another."""
        if not data:  # a mutation before this one cut all of it
            return self.randbytes(4)
        out = bytearray(data)
        at, other = sorted((self.randrange(len(out)), self.randrange(len(out))))
        kind = self.randrange(8)
        if kind == 0:
            for _ in range(self.choice((1, 1, 1, 2, 20))):
                out[self.randrange(len(out))] ^= 1 << self.randrange(8)
        elif kind == 1:
            del out[at:]
        elif kind == 2:
            out[at:at] = self.randbytes(self.choice((1, 4, 100)))
        elif kind == 3:
            out[at:other] = bytes(other - at)
        elif kind == 4:
            out[at:other] = out[at:other] * 2
        elif kind == 5:
            middle = (at + other) // 2
            out[at:other] = out[middle:other] + out[at:middle]
        elif kind == 6:
            out[at:other] = self.choice(donors)[at:other]
        else:
            del out[at:other]
        return bytes(out)

    def json(self, thing: Any) -> str:
        """Change one to three nodes of a JSON object: value, type, name, presence, nesting."""
        text = json.dumps(self.nodes(thing))
        if self.random() < 0.05:
            text = self.choice(("[" * 20_000, '{"a":' * 20_000, text[:-1], text + ",", f"[{text}]"))
        text = text.replace(f'"{HUGE}"', "1e400")
        return text.replace(f'"{DEEP}"', "[" * 20_000 + "]" * 20_000)

    def nodes(self, thing: Any) -> Any:
        """Change one to three nodes; a dictionary stays one."""
        thing = copy.deepcopy(thing)
        for _ in range(self.choice((1, 1, 1, 2, 3))):
            changed = self._node(thing)
            thing = changed if isinstance(changed, dict) or not isinstance(thing, dict) else thing
        return thing

    def odd(self) -> Any:
        """Return a value that few fields expect."""
        return copy.deepcopy(self.choice(ODD))

    def _node(self, thing: Any) -> Any:
        if isinstance(thing, dict) and thing and self.random() < 0.93:
            key, kind = self.choice(list(thing)), self.random()
            if kind < 0.1:
                del thing[key]
            elif kind < 0.17:
                thing[self.choice(("x", "", "\ud800", key + "x"))] = thing.pop(key)
            elif kind < 0.22:
                thing[self.choice(("more", "version", "run"))] = self.odd()
            else:
                thing[key] = self._node(thing[key])
            return thing
        if isinstance(thing, list) and thing and self.random() < 0.85:
            at = self.randrange(len(thing))
            if self.random() < 0.1:
                thing.insert(at, thing[at])
            else:
                thing[at] = self._node(thing[at])
            return thing
        if isinstance(thing, str) and thing and self.random() < 0.5:
            at = self.randrange(len(thing))
            return thing[:at] + self.choice(("", "0", "f", "=", "?", "\ud800")) + thing[at + 1 :]
        if isinstance(thing, int | float) and self.random() < 0.3:
            near = (thing + 1, thing - 1, -thing, thing * 10**6)
            return self.choice((*near, float(thing)) if abs(thing) < 1e300 else near)
        return self.odd()


class Fault(AssertionError):
    """A mutation was accepted that changed a value."""


DTYPES = {
    "F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1",
    "U8": "u1", "BOOL": "?",
}  # fmt: skip


def plainly(data: bytes) -> dict[str, np.ndarray]:
    """Read safetensors without the library; bfloat16 as its bits."""
    size = struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8 : 8 + size])
    read = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            kind = DTYPES.get(entry["dtype"], "u2")
            part = data[8 + size + first : 8 + size + last]
            read[name] = np.frombuffer(part, f"<{kind}" if kind != "?" else "?").reshape(
                entry["shape"]
            )
    return read


def changed_safetensors(chance: Chance, data: bytes) -> bytes:
    """Change header, metadata, lengths, types or bytes of a safetensors file."""
    kind = chance.random()
    if kind < 0.25:
        return chance.flip(data, [data])
    size = struct.unpack_from("<Q", data)[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    if kind < 0.35:
        count = chance.choice((*COUNTS, size - 1, size + 1, 2**40)) % 2**64
        return struct.pack("<Q", count) + data[8:]
    if kind < 0.5:
        name = chance.choice([n for n in header if n != "__metadata__"])
        odd = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "BF16", "C64", "U16", "U64", "F6_E2M3", "X")
        header[name]["dtype"] = chance.choice((*DTYPES, *odd))
        text = json.dumps(header)
    elif kind < 0.75 and "__metadata__" in header:
        meta = header["__metadata__"]
        meta["vitguard.update"] = chance.json(json.loads(meta["vitguard.update"]))
        text = json.dumps(header)
    elif kind < 0.85:
        at = chance.randrange(len(body)) & ~3
        body = body[:at] + np.float32(chance.choice(FLOATS)).tobytes() + body[at + 4 :]
        text = json.dumps(header)
    else:
        text = chance.json(header)
    new = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(new)) + new + body
