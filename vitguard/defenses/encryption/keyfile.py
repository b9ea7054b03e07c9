"""Keeping keys on disk: encrypted under a passphrase, readable by their owner alone."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path
from typing import Any

from vitguard.errors import Rejected, expected, missing_extra

__all__ = ["cipher_of", "decrypt", "read_private", "write_private"]

_SCRYPT = {"length": 32, "n": 2**15, "r": 8, "p": 1}


def read_private(path: Path) -> bytes:
    """Return the content of a file that nobody else can read.

    Raises:
        Rejected: Others can read it.
        InputError: There is no such file.
    """
    if not path.is_file():
        raise expected("a key file", f"no file at {path}")
    if os.name == "posix" and stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise Rejected(
            "key", f"{path}, which others can read: chmod 600 it", "a key file of mode 600"
        )
    return path.read_bytes()


def cipher_of(passphrase: str, salt: bytes) -> Any:
    """Return AES-256-GCM under a key that scrypt makes of the passphrase.

    Raises:
        InputError: The passphrase is empty.
        MissingExtra: `cryptography` is not installed.
    """
    if not passphrase:
        raise expected("a passphrase", "an empty one")
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
    except ImportError as error:
        raise missing_extra("KeySet.save", "cryptography") from error
    return AESGCM(Scrypt(salt=salt, **_SCRYPT).derive(passphrase.encode()))


def decrypt(cipher: Any, nonce: bytes, sealed: bytes, associated: bytes) -> bytes:
    """Return the plain content.

    Raises:
        Rejected: Wrong passphrase, or a changed file.
    """
    from cryptography.exceptions import InvalidTag

    try:
        return cipher.decrypt(nonce, sealed, associated)
    except InvalidTag as error:
        raise Rejected(
            "key", "a wrong passphrase or a changed file", "a key file and its passphrase"
        ) from error


def write_private(path: Path, data: bytes) -> None:
    """Write beside `path` with mode 600 from the first byte on, then move it into place."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise expected("a writable path for the keys", f"{path} ({error.strerror})") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
