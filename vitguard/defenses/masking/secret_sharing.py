"""Seeds, the keys and masks that follow from them, and their shares.

Only primitives of `cryptography` and pycryptodome are combined here: X25519, HKDF-SHA256, ChaCha20,
ChaCha20-Poly1305, and Shamir's scheme over GF(2^128). A seed has 16 bytes, as that field does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import combinations, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitguard.defenses.encryption.secret import Secret
from vitguard.errors import Rejected, missing_extra

__all__ = [
    "SEED", "add_mask", "commitment", "open_share", "pair_key", "public_half", "rebuild",
    "require_masking", "seal_share", "split",
]  # fmt: skip

SEED = 16
_PIECE = 1 << 16  # values masked at once: they stay in the cache
_TRIES = 512  # sets of shares that are tried where some are false


def require_masking() -> Any:
    """Import and return pycryptodome's Shamir.

    Raises:
        MissingExtra: cryptography, or pycryptodome, is not installed.
    """
    try:
        import cryptography.hazmat.primitives.asymmetric.x25519  # noqa: F401
        from Crypto.Protocol.SecretSharing import Shamir
    except ImportError as error:
        missing = "pycryptodome" if (error.name or "").startswith("Crypto") else "cryptography"
        raise missing_extra("MaskedAggregation", missing) from error
    return Shamir


def _derived(secret: bytes, salt: bytes, purpose: bytes) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), 32, salt, b"vitguard masks, " + purpose).derive(secret)


def _private(seed: Secret[bytes], binding: bytes) -> Any:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(_derived(seed.reveal(), binding, b"X25519"))


def public_half(seed: Secret[bytes], binding: bytes) -> bytes:
    """Return the X25519 public key that follows from a seed, 32 bytes."""
    return _private(seed, binding).public_key().public_bytes_raw()


def commitment(seed: Secret[bytes], binding: bytes) -> bytes:
    """Return 32 bytes that fix a self-mask's seed and do not give it away."""
    return _derived(seed.reveal(), binding, b"commitment")


def self_key(seed: Secret[bytes], binding: bytes) -> Secret[bytes]:
    """Return the ChaCha20 key of a client's own mask."""
    return Secret(_derived(seed.reveal(), binding, b"self-mask"))


def pair_key(seed: Secret[bytes], peer: bytes, binding: bytes, purpose: str) -> Secret[bytes]:
    """Return the key that a client shares with a peer, for one purpose.

    Raises:
        Rejected: The peer's public key is a point of small order.
    """
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

    try:
        shared = Secret(_private(seed, binding).exchange(X25519PublicKey.from_public_bytes(peer)))
    except ValueError:
        raise Rejected("key", "a public key of small order, or of another length") from None
    return Secret(_derived(shared.reveal(), binding, purpose.encode()))


def add_mask(total: NDArray[np.uint32], key: Secret[bytes], sign: int) -> None:
    """Add the mask of a key to values modulo 2^32, in place, or take it away (`sign` -1).

    A key masks one vector: it is derived for one round and one pair.
    """
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

    stream = Cipher(ChaCha20(key.reveal(), bytes(16)), None).encryptor()
    zeros, buffer = bytes(4 * _PIECE), bytearray(4 * _PIECE)
    words = np.frombuffer(buffer, "<u4")
    apply = np.add if sign > 0 else np.subtract
    for at in range(0, len(total), _PIECE):
        part = total[at : at + _PIECE]
        stream.update_into(memoryview(zeros)[: 4 * len(part)], buffer)
        apply(part, words[: len(part)], out=part)


def seal_share(key: Secret[bytes], share: Secret[bytes], about: bytes) -> bytes:
    """Encrypt what one client sends another; the key is used for this alone."""
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    return ChaCha20Poly1305(key.reveal()).encrypt(bytes(12), share.reveal(), about)


def open_share(key: Secret[bytes], sealed: bytes, about: bytes) -> Secret[bytes]:
    """Decrypt what `seal_share` made.

    Raises:
        Rejected: It was changed, or is for or of somebody else.
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    try:
        return Secret(ChaCha20Poly1305(key.reveal()).decrypt(bytes(12), sealed, about))
    except InvalidTag:
        raise Rejected("share", "a share that was changed on its way") from None


def split(seed: Secret[bytes], threshold: int, count: int) -> list[Secret[bytes]]:
    """Return `count` shares of a seed, any `threshold` of which give it back."""
    shares = require_masking().split(threshold, count, seed.reveal(), ssss=False)
    return [Secret(share) for _, share in sorted(shares)]


def rebuild(
    shares: Mapping[int, bytes], threshold: int, public: bytes, binding: bytes, make: Any
) -> Secret[bytes]:
    """Return the seed that `make(seed, binding)` turns into `public`.

    Where shares are false, other sets of them are tried: with few false ones a true set is found.

    Args:
        shares: By index, from 1.
        public: What the client said of the seed, signed, when the round began.

    Raises:
        Rejected: There are too few shares, or too many false ones.
    """
    if len(shares) < threshold:
        raise Rejected("clients", f"{len(shares)} shares of a seed where {threshold} are needed")
    shamir = require_masking()
    for chosen in islice(combinations(sorted(shares.items()), threshold), _TRIES):
        seed = Secret(bytes(shamir.combine(list(chosen), ssss=False)))
        if make(seed, binding) == public:
            return seed
    raise Rejected("share", "shares that do not give back the seed: some are false")


def fingerprint(parts: list[bytes]) -> bytes:
    """Return the SHA-256 of parts, each with its length."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.digest()
