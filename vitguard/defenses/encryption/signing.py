"""The server's signature: only the server can have made a sum that clients open."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any, NoReturn

from vitguard.defenses.encryption.keyfile import read_key_file, write_key_file
from vitguard.defenses.encryption.secret import Secret
from vitguard.errors import Rejected, expected, missing_extra

__all__ = ["SigningKey", "verify"]

_DOMAIN = b"vitguard sum, Ed25519 of SHA-256\0"


class SigningKey:
    """The server's Ed25519 key. The server makes it; the private half never leaves it.

    Guarantees:
        The private half is in no repr, pickle or log; a saved file is encrypted and private.

    Examples:
        >>> signing = SigningKey.generate()
        >>> len(signing.public_bytes())
        32
    """

    def __init__(self, seed: Secret[bytes]) -> None:
        self.__key: Any = _ed25519().Ed25519PrivateKey.from_private_bytes(seed.reveal())

    @staticmethod
    def generate() -> SigningKey:
        """Make a fresh key."""
        return SigningKey(Secret(secrets.token_bytes(32)))

    def __repr__(self) -> str:
        return f"SigningKey(public={self.public_bytes().hex()[:8]!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("keys are not pickled: save them with SigningKey.save")

    def __copy__(self) -> SigningKey:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> SigningKey:
        return self

    def public_bytes(self) -> bytes:
        """Return the verification key, 32 bytes. Publish it: `KeySet.trusting` takes it."""
        return self.__key.public_key().public_bytes_raw()

    def sign(self, digest: bytes) -> bytes:
        """Return the signature of a sum's SHA-256, 64 bytes."""
        return self.__key.sign(_DOMAIN + digest)

    def derived(self, purpose: bytes) -> Secret[bytes]:
        """Return a symmetric key of 32 bytes that follows from the private half, by purpose."""
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        return Secret(HKDF(SHA256(), 32, None, purpose).derive(self.__key.private_bytes_raw()))

    def save(self, path: str | Path, passphrase: str, *, overwrite: bool = False) -> None:
        """Write the key encrypted, as `KeySet.save` does."""
        hidden = Secret(passphrase)
        del passphrase
        seed = Secret(self.__key.private_bytes_raw().hex())
        facts = {"public": self.public_bytes().hex()}
        write_key_file(path, "signing", facts, {"seed": seed}, hidden, overwrite=overwrite)

    @staticmethod
    def load(path: str | Path, passphrase: str) -> SigningKey:
        """Read what `save` wrote.

        Raises:
            Rejected: Wrong passphrase, a changed file, or one that others may read.
            InputError: There is no such file.
        """
        hidden = Secret(passphrase)
        del passphrase
        _, inner = read_key_file(path, "signing", hidden)
        problem = ""
        try:
            return SigningKey(Secret(bytes.fromhex(inner["seed"].reveal())))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            problem = type(error).__name__
        raise Rejected("key", f"another file ({problem})", "a signing key's file")


# Points of small order, with the sign bit cleared: some signatures hold under them for any message.
_LOW_ORDER = {
    "00" * 32,
    "01" + "00" * 31,
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "ec" + "ff" * 30 + "7f",
    "ed" + "ff" * 30 + "7f",
    "ee" + "ff" * 30 + "7f",
}


def check_public(key: object) -> bytes:
    """Return a verification key if it is one.

    Raises:
        InputError: It is something else.
    """
    if isinstance(key, SigningKey):
        raise expected("the server's verification key", "its signing key", "Give public_bytes().")
    if not isinstance(key, bytes) or len(key) != 32:
        raise expected("a verification key of 32 bytes, from SigningKey.public_bytes", type(key))
    if bytes([*key[:31], key[31] & 0x7F]).hex() in _LOW_ORDER:
        raise expected(
            "a verification key of SigningKey.public_bytes", "one under which anybody can sign"
        )
    return key


def verify(public: bytes, digest: bytes, signature: bytes) -> None:
    """Check the signature of a sum.

    Raises:
        Rejected: It was not made by the holder of the private half.
    """
    from cryptography.exceptions import InvalidSignature

    key = _ed25519().Ed25519PublicKey.from_public_bytes(public)
    try:
        key.verify(signature, _DOMAIN + digest)
    except InvalidSignature as error:
        raise Rejected("signature", "a sum that the server did not sign") from error


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise missing_extra("SigningKey", "cryptography") from error
    return ed25519
