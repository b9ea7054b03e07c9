"""The exceptions of vitguard, drawn once.

::

    VitguardError
    ├── InputError (ValueError)          a value, file, image or name that cannot be used
    │   ├── UnsupportedModel             no Vision Transformer was recognised in the model
    │   ├── Incompatible                 defenses that cannot work together, or on this model
    │   └── Rejected                     an encrypted message, key file or sum that is not accepted
    ├── MissingExtra (ImportError)       an optional package is not installed
    ├── Unprotected (RuntimeError)       a defense would not act: refused, never passed on
    │   └── UpdateRefused            a defense let no update leave, as it should
    │       ├── GateClosed           a client's own gate let an update not leave
    │       └── SuspiciousWeights    weights that a server sent have signs of a craft
    ├── NoImage                          an attack ended without an image, perhaps with labels
    │   ├── Blocked                  it asked for a tensor that the adversary cannot read
    │   └── NotApplicable            its assumption does not hold for what it was given
    ├── LeakFound                        `AuditReport.raise_if_leaks` found what it was asked for
    └── Inconclusive                     a test of `vitguard.testing` could not have failed

Every message says what was expected, what was got and what to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Blocked",
    "GateClosed",
    "Incompatible",
    "Inconclusive",
    "InputError",
    "LeakFound",
    "MissingExtra",
    "NoImage",
    "NotApplicable",
    "Rejected",
    "SuspiciousWeights",
    "Unprotected",
    "UnsupportedModel",
    "UpdateRefused",
    "VitguardError",
    "expected",
    "missing_extra",
]


class VitguardError(Exception):
    """Base of everything that vitguard raises on purpose."""


class InputError(VitguardError, ValueError):
    """A value, file, image or name that cannot be used."""


class UnsupportedModel(InputError):
    """The model has no Vision Transformer that `Anatomy` recognises."""


class Incompatible(InputError):
    """Defenses that cannot work together, or a defense that cannot work on this model."""


class Rejected(InputError):
    """An encrypted message, key file or sum that is not accepted; `cause` says in one word why."""

    def __init__(self, cause: str, got: str, what: str = "an encrypted message that holds") -> None:
        super().__init__(f"Expected {what}, got {got}.")
        self.cause = cause
        self.got = got
        self.what = what

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return (type(self), (self.cause, self.got, self.what))


class MissingExtra(VitguardError, ImportError):
    """An optional package is not installed; the message names the pip command."""


class Unprotected(VitguardError, RuntimeError):
    """A defense would not act on what was about to happen, so it was refused."""


class UpdateRefused(Unprotected):
    """A defense let no update leave, as it should. An audit has nothing to attack then."""


class GateClosed(UpdateRefused):
    """The client's own gate let an update not leave; `decision` says what it found.

    The decision was made with the images: it is for the client alone.
    """

    def __init__(self, message: str, decision: Any = None) -> None:
        super().__init__(message)
        self.decision = decision

    def __reduce__(self) -> tuple[type, tuple[str, Any]]:
        return (type(self), (str(self), self.decision))


class SuspiciousWeights(UpdateRefused):
    """Weights that a server sent have signs of a craft; `inspection` says which.

    What it says of the gradient was computed with the images: it is for the client alone.
    """

    def __init__(self, message: str, inspection: Any = None) -> None:
        super().__init__(message)
        self.inspection = inspection

    def __reduce__(self) -> tuple[type, tuple[str, Any]]:
        return (type(self), (str(self), self.inspection))


class NoImage(VitguardError):
    """An attack ended without an image.

    Attributes:
        labels: Class indices that it read all the same, integers (batch,); None where it read none.
    """

    labels: Tensor | None = None


class Blocked(NoImage):
    """The adversary cannot read a tensor: it was sealed, withheld or never released."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} cannot be read: {reason}")
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return (type(self), (self.name, self.reason))


class NotApplicable(NoImage):
    """An attack's assumption does not hold; this says nothing about protection."""


class LeakFound(VitguardError):
    """A defended configuration leaks more than was allowed."""


class Inconclusive(VitguardError):
    """A test could not have failed: its control shows nothing. It is neither passed nor failed."""


def expected(what: str, got: object, do: str = "") -> InputError:
    """Return the one form of input error: expected, got, do."""
    message = f"Expected {what}, got {got}."
    return InputError(f"{message} {do}" if do else message)


def missing_extra(what: str, package: str, extra: str | None = None) -> MissingExtra:
    """Return the error for a package that is needed now and not installed."""
    command = f'pip install "vitguard[{extra}]"' if extra else f"pip install {package}"
    return MissingExtra(f"{what} needs {package}: {command}")
