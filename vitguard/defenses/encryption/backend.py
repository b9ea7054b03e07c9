"""The only file that calls TenSEAL, through `tenseal.sealapi`: no protobuf is ever parsed.

TenSEAL's vector layer trusts the sizes in a message (missing ones crash the process, false ones
read past the buffer) and its contexts carry keys. `sealapi` reads one SEAL ciphertext at a time,
whose size, level and scale are checked here before it is used.
"""

from __future__ import annotations

import os
import tempfile
import threading
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Complex

from vitguard.defenses.encryption.presets import Layout
from vitguard.errors import Rejected, expected, missing_extra

__all__ = ["Engine", "require_tenseal", "shared_engine"]

_SEAL_HEADER = b"\x5e\xa1\x10"  # magic 0xA15E, little endian, and the header's size of 16
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_BLOCK = 1 << 17


def require_tenseal() -> ModuleType:
    """Import and return `tenseal.sealapi`.

    Raises:
        MissingExtra: TenSEAL is not installed.
    """
    try:
        import tenseal.sealapi as sealapi
    except ImportError as error:
        raise missing_extra("EncryptedGradients", "tenseal") from error
    return sealapi


class _Slot:
    """A file in memory, because sealapi reads and writes paths only; nothing reaches a disk."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        if hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd"):
            self._handle = os.memfd_create("vitguard", os.MFD_CLOEXEC)
            self._folder = None
            self.path = f"/proc/self/fd/{self._handle}"
        else:  # other systems: a folder that only this user can enter
            self._folder = tempfile.TemporaryDirectory(prefix="vitguard-")
            self.path = os.path.join(self._folder.name, "seal")
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)

    def fits(self) -> bool:
        """Whether this process made the file: a fork shares it with its parent."""
        return self._owner == os.getpid()

    def put(self, data: bytes | memoryview) -> str:
        os.pwrite(self._handle, data, 0)  # over the last content: its pages are kept
        os.ftruncate(self._handle, len(data))
        return self.path

    def take(self) -> bytes:
        size = os.fstat(self._handle).st_size
        return os.pread(self._handle, size, 0)

    def clear(self) -> None:
        os.ftruncate(self._handle, 0)

    def __del__(self) -> None:
        try:
            os.close(self._handle)
        except (OSError, AttributeError):  # the interpreter is going down
            return


@lru_cache(maxsize=8)
def shared_engine(layout: Layout) -> Engine:
    """Return this process's engine for a layout: it holds no key, and its tables take 15 ms."""
    return Engine(layout)


class Engine:
    """Encode, encrypt, add and decrypt single ciphertexts of one layout. Thread-safe."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._seal: Any = require_tenseal()
        s = self._seal
        parameters = s.EncryptionParameters(s.SCHEME_TYPE.CKKS)
        parameters.set_poly_modulus_degree(layout.degree)
        parameters.set_coeff_modulus(s.CoeffModulus.Create(layout.degree, list(layout.bits)))
        self._context = s.SEALContext(parameters, True, s.SEC_LEVEL_TYPE.TC128)
        if not self._context.parameters_set():
            raise expected("parameters within SEAL's 128-bit table", layout)
        self.primes = tuple(int(m.value()) for m in parameters.coeff_modulus())
        self._coder = s.CKKSEncoder(self._context)
        self._evaluator = s.Evaluator(self._context)
        self._lock = threading.RLock()
        self._slot = _Slot()

    def __reduce__(self) -> tuple[type, tuple[Layout]]:
        return (type(self), (self.layout,))

    def new_secret(self) -> bytes:
        """Return a fresh secret key, serialised by SEAL."""
        secret = self._seal.KeyGenerator(self._context).secret_key()
        with self._lock:
            try:
                return self._save(secret)
            finally:
                self._file().clear()

    def secret(self, data: bytes) -> Any:
        """Return the SEAL secret key in `data`.

        Raises:
            InputError: It is not a secret key of these parameters.
        """
        key = self._seal.SecretKey()
        with self._lock:
            try:
                key.load(self._context, self._file().put(data))
            except (RuntimeError, ValueError) as error:
                raise expected("a secret key of this preset", f"other bytes ({error})") from error
            finally:
                self._file().clear()
        return key

    def encryptor(self, secret: Any) -> Any:
        """Return SEAL's symmetric encryptor."""
        return self._seal.Encryptor(self._context, secret)

    def decryptor(self, secret: Any) -> Any:
        """Return SEAL's decryptor."""
        return self._seal.Decryptor(self._context, secret)

    def encrypt(self, encryptor: Any, slots: Complex[np.ndarray, " slots"]) -> bytes:
        """Encrypt one vector of slots; half of the result is the seed that SEAL expands."""
        plain = self._seal.Plaintext()
        self._coder.encode(slots.tolist(), self.layout.scale, plain)
        return self._save(encryptor.encrypt_symmetric(plain))

    def load(self, data: bytes | memoryview) -> Any:
        """Return the ciphertext in `data`, fit to be added to others of this layout.

        Raises:
            Rejected: It is malformed, too large, or of another size, level or scale.
        """
        self._check_stream(data)
        cipher = self._seal.Ciphertext()
        with self._lock:
            try:
                cipher.load(self._context, self._file().put(data))
            except (RuntimeError, ValueError, MemoryError) as error:
                raise Rejected("ciphertext", f"SEAL refused a ciphertext ({error})") from error
        if (
            cipher.size() != 2
            or cipher.scale != self.layout.scale
            or list(cipher.parms_id()) != list(self._context.first_parms_id())
            or not cipher.is_ntt_form()
        ):
            raise Rejected("ciphertext", "a ciphertext of another size, level or scale")
        return cipher

    def add(self, total: Any, cipher: Any) -> None:
        """Add `cipher` to `total` in place."""
        self._evaluator.add_inplace(total, cipher)

    def subtract(self, total: Any, cipher: Any) -> None:
        """Subtract `cipher` from `total` in place."""
        self._evaluator.sub_inplace(total, cipher)

    def save(self, cipher: Any) -> bytes:
        """Return the bytes of a ciphertext."""
        return self._save(cipher)

    def decrypt(self, decryptor: Any, cipher: Any) -> Complex[np.ndarray, " slots"]:
        """Return the slots of a ciphertext, noise included: round them before they leave."""
        plain = self._seal.Plaintext()
        decryptor.decrypt(cipher, plain)
        return np.fromiter(self._coder.decode_complex(plain), np.complex128, self.layout.slots)

    def _file(self) -> _Slot:
        if not self._slot.fits():
            self._slot = _Slot()
        return self._slot

    def _save(self, sealed: Any) -> bytes:
        with self._lock:
            file = self._file()
            sealed.save(file.path)
            return file.take()

    def _check_stream(self, data: bytes | memoryview) -> None:
        """Refuse streams that SEAL would inflate far beyond a ciphertext."""
        most = 2 * 8 * self.layout.degree + 4096  # two polynomials of 64-bit words
        if len(data) < 32 or len(data) > most:
            raise Rejected("ciphertext", f"a ciphertext of {len(data)} bytes")
        size = int.from_bytes(data[8:16], "little")
        if data[:3] != _SEAL_HEADER or any(data[6:8]) or size != len(data):
            raise Rejected("ciphertext", "bytes that are no SEAL ciphertext")
        compression = data[5]
        if compression == 2:
            _check_zstd(data[16:], most)
        elif compression != 0:
            raise Rejected("ciphertext", f"compression mode {compression}")


def _check_zstd(frame: bytes | memoryview, most: int) -> None:
    """Walk the frame's block headers (RFC 8878, section 3.1.1): a block holds at most 128 KiB."""
    if frame[:4] != _ZSTD_MAGIC:
        raise Rejected("ciphertext", "a compressed stream without its magic number")
    descriptor = frame[4]
    single, checksum, dictionary = descriptor & 0x20, descriptor & 0x04, descriptor & 0x03
    if dictionary or descriptor & 0x08:
        raise Rejected("ciphertext", "a compressed stream with a dictionary")
    if not single and 10 + (frame[5] >> 3) > 24:
        raise Rejected("ciphertext", "a compressed stream with a large window")
    content = (1 if single else 0, 2, 4, 8)[descriptor >> 6]
    at, blocks, last = 5 + (0 if single else 1) + content, 0, False
    while not last:
        header = int.from_bytes(frame[at : at + 3], "little")
        last, kind, size = bool(header & 1), (header >> 1) & 3, header >> 3
        at += 3 + (1 if kind == 1 else size)
        blocks += 1
        if kind == 3 or at > len(frame) or blocks > most // _ZSTD_BLOCK + 3:
            raise Rejected("ciphertext", "a compressed stream that is cut or inflates too far")
    if at + (4 if checksum else 0) != len(frame):
        raise Rejected("ciphertext", "bytes after a compressed stream")
