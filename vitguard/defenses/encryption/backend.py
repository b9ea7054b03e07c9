"""The only file that calls TenSEAL, through `tenseal.sealapi`: no protobuf is ever parsed.

TenSEAL's vector layer trusts the sizes in a message (missing ones crash the process, false ones
read past the buffer) and its contexts carry keys. `sealapi` reads one SEAL ciphertext at a time.
SEAL itself ends the process at some streams whose inner sizes are false, so it is given none: what
is inflated here must equal our own ciphertexts in all but coefficients and seed.

The secret key passes through a file in memory or through none: on systems without one, keys work
in the process that made them and are neither saved nor loaded.
"""

from __future__ import annotations

import os
import tempfile
import threading
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Complex

from vitguard.defenses.encryption.presets import Layout
from vitguard.defenses.encryption.secret import Secret
from vitguard.errors import Rejected, Unprotected, expected, missing_extra

__all__ = ["Engine", "require_tenseal", "shared_engine"]

_SEAL_HEADER = b"\x5e\xa1\x10"  # magic 0xA15E, little endian, and the header's size of 16
_HEAD = 97  # bytes before the coefficients: 73 of fields, SEAL's header, their number
_SEED = 64  # bytes, at the end of a seeded ciphertext
_SEED_HEAD = 17  # SEAL's header and the generator's kind, before the seed
_KEY_HEAD = 72  # bytes before a secret key's coefficients: 48 of fields, header, their number
_FAULTS = (RuntimeError, ValueError, IndexError, OverflowError, MemoryError, OSError)
"""What SEAL's exceptions become in Python, and what its file can raise."""


def require_tenseal() -> ModuleType:
    """Import and return `tenseal.sealapi`.

    Raises:
        MissingExtra: TenSEAL, or zstandard, is not installed.
    """
    try:
        import tenseal.sealapi as sealapi
        import zstandard  # noqa: F401
    except ImportError as error:
        missing = "zstandard" if error.name == "zstandard" else "tenseal"
        raise missing_extra("EncryptedGradients", missing) from error
    return sealapi


class _Slot:
    """A file in memory where there is one, because sealapi reads and writes paths only."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        if hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd"):
            self._handle = os.memfd_create("vitguard", os.MFD_CLOEXEC)
            self._folder = None
            self.in_memory = True
            self.path = f"/proc/self/fd/{self._handle}"
        else:  # other systems: a folder that only this user can enter
            self._folder = tempfile.TemporaryDirectory(prefix="vitguard-")
            self.in_memory = False
            self.path = os.path.join(self._folder.name, "seal")
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)

    def fits(self) -> bool:
        """Whether this process made the file: a fork shares it with its parent."""
        return self._owner == os.getpid()

    def put(self, data: bytes | memoryview | Secret[bytes]) -> str:
        hidden = data if isinstance(data, Secret) else Secret(data)
        os.pwrite(self._handle, hidden.reveal(), 0)  # over the last content: its pages are kept
        os.ftruncate(self._handle, len(hidden.reveal()))
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


@dataclass(frozen=True)
class _Form:
    """What never varies in streams of one kind.

    Args:
        size: Bytes of the inflated stream.
        head: Its start: level, form, sizes, scale, and the header of the coefficients.
        middle: Before the last `end` bytes: header and kind of a seed.
    """

    size: int
    head: bytes
    middle: bytes = b""
    end: int = 0

    def fits(self, content: bytes) -> bool:
        """Whether a stream differs in coefficients and seed alone."""
        before = len(content) - self.end
        return (
            len(content) == self.size
            and content.startswith(self.head)
            and content[before - len(self.middle) : before] == self.middle
        )


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
        self._forms = self._forms_of_own()

    def __reduce__(self) -> tuple[type, tuple[Layout]]:
        return (type(self), (self.layout,))

    def new_secret(self) -> Any:
        """Return a fresh SEAL secret key."""
        return self._seal.KeyGenerator(self._context).secret_key()

    def secret_bytes(self, key: Any) -> Secret[bytes]:
        """Return a secret key, serialised by SEAL.

        Raises:
            Unprotected: The key would touch a disk, because the system has no files in memory.
        """
        with self._lock:
            try:
                return Secret(self._save(key, in_memory=True))
            finally:
                self._file().clear()

    def secret(self, data: Secret[bytes]) -> Any:
        """Return the SEAL secret key in `data`.

        Raises:
            InputError: It is not a secret key of these parameters.
            Unprotected: The key would touch a disk, because the system has no files in memory.
        """
        key = self._seal.SecretKey()
        with self._lock:
            file = self._file(in_memory=True)
            try:
                key.load(self._context, file.put(self._checked_key(data)))
            except _FAULTS as error:
                problem = type(error).__name__  # their words and frames are left behind
            else:
                return key
            finally:
                file.clear()
        raise expected("a secret key of this preset", f"other bytes ({problem})")

    def encryptor(self, secret: Any) -> Any:
        """Return SEAL's symmetric encryptor."""
        return self._seal.Encryptor(self._context, secret)

    def decryptor(self, secret: Any) -> Any:
        """Return SEAL's decryptor."""
        return self._seal.Decryptor(self._context, secret)

    def encrypt(self, encryptor: Any, slots: Complex[np.ndarray, " slots"]) -> bytes:
        """Encrypt one vector of slots; half of the result is the seed that SEAL expands.

        Raises:
            Rejected: SEAL refused.
        """
        plain = self._seal.Plaintext()
        try:
            self._coder.encode(slots.tolist(), self.layout.scale, plain)
            return self._save(encryptor.encrypt_symmetric(plain))
        except _FAULTS as error:
            raise _refused("values", error) from error

    def load(self, data: bytes | memoryview, *, seeded: bool) -> Any:
        """Return the ciphertext in `data`, fit to be added to others of this layout.

        Args:
            seeded: Whether it must be fresh, its second half a seed, or a sum, written out.

        Raises:
            Rejected: It is malformed, too large, of another size, level or scale, or transparent:
                readable without a key.
        """
        stream = self._checked(data, self._forms[seeded])
        cipher = self._seal.Ciphertext()
        try:
            with self._lock:
                cipher.load(self._context, self._file().put(stream))
            sound = (
                cipher.size() == 2
                and cipher.scale == self.layout.scale
                and list(cipher.parms_id()) == list(self._context.first_parms_id())
                and cipher.is_ntt_form()
            )
            transparent = cipher.is_transparent()
        except _FAULTS as error:
            raise _refused("a ciphertext", error) from error
        if not sound:
            raise Rejected("ciphertext", "a ciphertext of another size, level or scale")
        if transparent:
            raise Rejected("ciphertext", "a ciphertext that anyone can read and make")
        return cipher

    def add(self, total: Any, cipher: Any) -> None:
        """Add `cipher` to `total` in place.

        Raises:
            Rejected: The sum would be transparent, or SEAL refused; `total` is then as it was.
        """
        try:
            self._evaluator.add_inplace(total, cipher)
        except _FAULTS as error:
            if total.is_transparent():  # SEAL looks after it added; no total is that before
                self._evaluator.sub_inplace(total, cipher)
            raise _refused("a sum", error) from error

    def subtract(self, total: Any, cipher: Any) -> None:
        """Subtract from `total` in place what was added to it: exact, modulo primes.

        Raises:
            Rejected: SEAL refused.
        """
        try:
            self._evaluator.sub_inplace(total, cipher)
        except _FAULTS as error:
            raise _refused("a difference", error) from error

    def save(self, cipher: Any) -> bytes:
        """Return the bytes of a ciphertext.

        Raises:
            Rejected: SEAL refused.
        """
        try:
            return self._save(cipher)
        except _FAULTS as error:
            raise _refused("a ciphertext", error) from error

    def decrypt(self, decryptor: Any, cipher: Any) -> Complex[np.ndarray, " slots"]:
        """Return the slots of a ciphertext, noise included: round them before they leave.

        Raises:
            Rejected: SEAL refused.
        """
        plain = self._seal.Plaintext()
        try:
            decryptor.decrypt(cipher, plain)
            return np.fromiter(self._coder.decode_complex(plain), np.complex128, self.layout.slots)
        except _FAULTS as error:
            raise _refused("a ciphertext", error) from error

    def _file(self, *, in_memory: bool = False) -> _Slot:
        if not self._slot.fits():
            self._slot = _Slot()
        if in_memory and not self._slot.in_memory:
            raise Unprotected(
                "Expected a system with files in memory (Linux: memfd_create and /proc), got one "
                "without: the secret key would touch the disk. Save and load keys on Linux."
            )
        return self._slot

    def _save(self, sealed: Any, *, in_memory: bool = False) -> bytes:
        with self._lock:
            file = self._file(in_memory=in_memory)
            sealed.save(file.path)
            return file.take()

    def _forms_of_own(self) -> dict[bool, _Form]:
        """Return what never varies in our ciphertexts, by whether they are seeded."""
        plain = self._seal.Plaintext()
        self._coder.encode([0j] * self.layout.slots, self.layout.scale, plain)
        seeded = self._save(self.encryptor(self.new_secret()).encrypt_symmetric(plain))
        cipher = self._seal.Ciphertext()
        with self._lock:
            cipher.load(self._context, self._file().put(seeded))
        short, whole = (self._inflated(data) for data in (seeded, self._save(cipher)))
        middle = short[-_SEED - _SEED_HEAD : -_SEED]
        return {
            True: _Form(len(short), short[:_HEAD], middle, _SEED),
            False: _Form(len(whole), whole[:_HEAD]),
        }

    def _checked(self, data: bytes | memoryview, form: _Form) -> bytes:
        """Return the stream without compression; all but coefficients and seed is as in our own.

        SEAL reads sizes in the stream, and some false ones end the process.
        """
        content = self._inflated(data)
        if not form.fits(content):
            raise Rejected("ciphertext", "a ciphertext of another size, level or scale")
        start = bytes(data[:5]) + bytes(3) + (16 + len(content)).to_bytes(8, "little")
        return start + content

    def _checked_key(self, data: Secret[bytes]) -> Secret[bytes]:
        """Return a secret key's stream, checked like a ciphertext's."""
        own = self.secret_bytes(self.new_secret())
        mine = Secret(self._inflated(own.reveal()))
        form = _Form(len(mine.reveal()), mine.reveal()[:_KEY_HEAD])
        return Secret(self._checked(data.reveal(), form))

    def _inflated(self, data: bytes | memoryview) -> bytes:
        """Return what follows SEAL's header, never more than two polynomials of 64-bit words."""
        most = 2 * 8 * self.layout.degree + 4096
        if len(data) < 32 or len(data) > most:
            raise Rejected("ciphertext", f"a ciphertext of {len(data)} bytes")
        size = int.from_bytes(data[8:16], "little")
        if data[:3] != _SEAL_HEADER or any(data[6:8]) or size != len(data):
            raise Rejected("ciphertext", "bytes that are no SEAL ciphertext")
        compression = data[5]
        if compression == 0:
            return bytes(data[16:])
        if compression != 2:
            raise Rejected("ciphertext", f"compression mode {compression}")
        return _inflate(bytes(data[16:]), most)


_LOCAL = threading.local()


def _decompressor() -> Any:
    """Return this thread's decompressor: to make one takes a sixth of the time to use it."""
    import zstandard

    if not hasattr(_LOCAL, "decompressor"):
        _LOCAL.decompressor = zstandard.ZstdDecompressor()
    return _LOCAL.decompressor


def _inflate(frame: bytes, most: int) -> bytes:
    """Return the content of one zstd frame that says its size."""
    import zstandard

    try:
        said = zstandard.get_frame_parameters(frame).content_size
        if said > most:  # also where it is unknown: it is allocated at once
            raise Rejected("ciphertext", "a compressed stream that inflates too far")
        return _decompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Rejected("ciphertext", f"a compressed stream that is damaged ({error})") from error


def _refused(what: str, error: BaseException) -> Rejected:
    if isinstance(error, Rejected):
        return error
    return Rejected("ciphertext", f"{what} that SEAL refused ({error or type(error).__name__})")
