"""Keeping keys on disk: encrypted under a passphrase, readable by their owner alone.

::

    version, kind, facts        plain, and covered by the cipher's tag
    n                           scrypt's cost; r = 8, p = 1
    salt, nonce, secret         AES-256-GCM of a JSON object

Version 1 had neither kind nor cost: it held a client's keys at 2^15.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from vitguard.defenses.encryption.secret import Secret
from vitguard.errors import InputError, Rejected, expected, missing_extra
from vitguard.files import parsed_json, write_atomically

__all__ = ["read_key_file", "write_key_file"]

VERSION = 2
_COST = 1 << 17  # 128 MiB, about a third of a second
_OLD_COST = 1 << 15
_COSTS = (1 << 17, 1 << 18)  # what a file may ask for
_MOST = 1 << 20  # bytes of a file
_FAULTS = (KeyError, TypeError, AttributeError, ValueError, OverflowError)
Kind = Literal["client", "server", "signing"]


def write_key_file(
    path: str | Path,
    kind: Kind,
    facts: Mapping[str, Any],
    inner: Mapping[str, Secret[str]],
    passphrase: Secret[str],
    *,
    overwrite: bool,
) -> None:
    """Write keys encrypted (scrypt, AES-256-GCM), mode 600, atomically.

    Raises:
        InputError: The passphrase is empty, the folder cannot be written, or the file is there
            already and `overwrite` is false.
    """
    path = _path(path)
    if not overwrite and os.path.lexists(path):  # before the work; the writer checks for good
        raise _taken(path)
    salt, nonce = secrets.token_bytes(16), secrets.token_bytes(12)
    stored = {
        **facts, "version": VERSION, "kind": kind, "n": _COST,
        "salt": salt.hex(), "nonce": nonce.hex(),
    }  # fmt: skip
    sealed = _cipher(passphrase, salt, _COST).encrypt(nonce, _joined(inner), _associated(stored))
    content = json.dumps({**stored, "secret": base64.b64encode(sealed).decode()})
    try:
        write_atomically(path, content, private=True, overwrite=overwrite)
    except InputError as error:
        if isinstance(error.__cause__, FileExistsError):
            raise _taken(path) from error
        raise


def read_key_file(
    path: str | Path, kind: Kind, passphrase: Secret[str]
) -> tuple[dict[str, Any], dict[str, Secret[Any]]]:
    """Return the facts of a key file and what it keeps secret, by name.

    Raises:
        Rejected: Wrong passphrase, a changed file, one of another kind, or one that others read.
        InputError: There is no such file.
    """
    content = _read_private(_path(path))
    try:
        stored = parsed_json(content)
        sealed = base64.b64decode(stored.pop("secret"), validate=True)
        salt, nonce = bytes.fromhex(stored["salt"]), bytes.fromhex(stored["nonce"])
        found, cost = _kind_and_cost(stored)
        if (len(salt), len(nonce)) != (16, 12):
            raise ValueError("a salt or nonce of another length")
        associated = _associated(stored)
    except Rejected:
        raise
    except _FAULTS as error:
        raise Rejected("key", f"another file ({type(error).__name__})", "a key file") from error
    if found != kind:
        raise Rejected("key", f"a file of kind {found!r}", f"a key file of kind {kind!r}")
    plain = _decrypted(_cipher(passphrase, salt, cost), nonce, sealed, associated)
    return stored, _parted(plain)


def _path(given: object) -> Path:
    """Return what names a file.

    Raises:
        InputError: It names none.
    """
    if not isinstance(given, str | os.PathLike) or "\0" in str(given):
        raise expected("the path of a key file", repr(given)[:80])
    return Path(given)


def _kind_and_cost(stored: Mapping[str, Any]) -> tuple[str, int]:
    version = stored["version"]
    if type(version) is not int or not 1 <= version <= VERSION:
        raise Rejected("version", f"version {version!r}", f"a key file of version 1 to {VERSION}")
    if version == 1:
        return "client", _OLD_COST
    cost = stored["n"]
    if type(cost) is not int or cost not in _COSTS:
        raise Rejected("key", f"a scrypt cost of {cost!r}", f"a key file with one of {_COSTS}")
    return str(stored["kind"]), cost


def _associated(stored: Mapping[str, Any]) -> bytes:
    return json.dumps(stored, sort_keys=True).encode()


def _joined(inner: Mapping[str, Secret[str]]) -> bytes:
    return json.dumps({name: value.reveal() for name, value in inner.items()}).encode()


def _parted(plain: Secret[bytes]) -> dict[str, Secret[Any]]:
    """Return the parts of the plain content; no error of it carries them on."""
    try:
        return {str(k): Secret(v) for k, v in parsed_json(plain.reveal()).items()}
    except _FAULTS as error:
        problem = type(error).__name__
    raise Rejected("key", f"other content ({problem})", "a key file")


def _decrypted(cipher: Any, nonce: bytes, sealed: bytes, associated: bytes) -> Secret[bytes]:
    from cryptography.exceptions import InvalidTag

    try:
        return Secret(cipher.decrypt(nonce, sealed, associated))
    except InvalidTag as error:
        raise Rejected(
            "key", "a wrong passphrase or a changed file", "a key file and its passphrase"
        ) from error


def _cipher(passphrase: Secret[str], salt: bytes, cost: int) -> Any:
    """Return AES-256-GCM under a key that scrypt makes of the passphrase.

    Raises:
        InputError: The passphrase is empty or no text.
        MissingExtra: `cryptography` is not installed.
    """
    if not isinstance(passphrase.reveal(), str) or not passphrase.reveal():
        raise expected("a passphrase", "an empty one, or no text")
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError as error:
        raise missing_extra("A key file", "cryptography") from error
    return AESGCM(_derived(passphrase, salt, cost).reveal())


def _derived(passphrase: Secret[str], salt: bytes, cost: int) -> Secret[bytes]:
    from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

    scrypt = Scrypt(salt=salt, length=32, n=cost, r=8, p=1)
    try:
        return Secret(scrypt.derive(passphrase.reveal().encode("utf-8", "surrogatepass")))
    except MemoryError as error:
        raise expected(f"{cost >> 10} MiB of memory to open a key file", "less") from error


def _read_private(path: Path) -> bytes:
    """Return the content of a file that nobody else can read."""
    try:
        if not path.is_file():
            raise expected("a key file", f"no file at {path}")
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if os.name == "posix" and mode & 0o077:
                raise Rejected(
                    "key", f"{path}, which others can read: chmod 600 it", "a key file of mode 600"
                )
            content = file.read(_MOST + 1)
    except OSError as error:
        raise expected("a key file", f"{path} ({error.strerror or error})") from error
    if len(content) > _MOST:
        raise Rejected("key", f"{path}, which is larger than any", "a key file")
    return content


def _taken(path: str | Path) -> InputError:
    return expected(
        "a new key file", f"{path}, which is there already",
        "Give another path. overwrite=True destroys the keys in it.",
    )  # fmt: skip
