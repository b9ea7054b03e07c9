"""Encrypted gradients: CKKS that costs less than the plain upload."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor, nn

from vitguard import rounds
from vitguard.core import Traits, Update
from vitguard.defenses.base import Defense, Draws, UpdateDefense
from vitguard.defenses.encryption.backend import require_tenseal
from vitguard.defenses.encryption.client import Encryptor
from vitguard.defenses.encryption.keys import KeySet
from vitguard.defenses.encryption.manifest import Manifest
from vitguard.defenses.encryption.presets import preset
from vitguard.defenses.sealing import require_selection, selected
from vitguard.errors import Unprotected, expected
from vitguard.vit import Anatomy

__all__ = ["EncryptedGradients"]


@dataclass(frozen=True)
class EncryptedGradients(UpdateDefense):
    """Encrypt chosen tensors of the update; the server adds what it cannot read.

    Guarantees:
        A sealed tensor cannot be read from the update: `read` raises Blocked.
        The decrypted sum of quantised values is exact.

    Does not protect against:
        What stays plain: `vitguard plan` says which exact attacks remain for a selection.
        The sum itself, which every client reads, and clients that work with the server.

    Args:
        select: `attention`, `embedding`, `all`, `plan` (the smallest set that ends the closed
            forms and the search over tokens), another role, a regular expression, or several
            joined by `/`.
        preset: `quantised` (3.8 bytes a value, 10 clients), `many` (4.0, 100 clients), `precise`
            (7.6, 1,000 clients) or `compact` (2.7, coarse).
        force: Accept a selection under which an attack that gives the image back remains, by the
            analysis of `vitguard plan`: at batch size 1 and by the positions of the stack; its
            other defenses are not counted.
        rehearse: In an audit without `encryptor`, selections of up to this many values are
            encrypted under a key that is thrown away; larger ones are listed as sealed and no
            ciphertext is made. The reason of each sealed name says which.
        encryptor: A client's `Encryptor`; without one no update leaves outside an audit, or a guard
            whose draws come from a generator; make each update inside `guard.round(...)`.
            Its manifest is made of what the whole stack encrypts: protect a copy with
            the stack, without an encryptor, and call `Manifest.of(guard.encrypted(), bounds=...)`.
            It is no setting: it is in no repr, spec, report or pickle.

    Examples:
        >>> EncryptedGradients(select="plan").spec()
        'encryption:select=plan'
    """

    name: ClassVar[str] = "encryption"
    promise: ClassVar[str] = "the server adds ciphertext; clients open the sum and read it"
    select: str = "all"
    preset: Literal["quantised", "many", "precise", "compact"] = "quantised"
    force: bool = False
    rehearse: int = 1_000_000
    encryptor: InitVar[Encryptor | None] = None

    def __post_init__(self, encryptor: Encryptor | None) -> None:
        preset(self.preset)
        if self.rehearse < 0:
            raise expected("rehearse of at least 0 values", self.rehearse)
        if not self.select:
            raise expected("a selection of parameters", "an empty one")
        if encryptor is not None and not isinstance(encryptor, Encryptor):
            raise expected("an Encryptor", type(encryptor).__name__)
        if encryptor is not None and encryptor.keys.preset != self.preset:
            raise expected(f"an encryptor of preset {self.preset!r}", repr(encryptor.keys.preset))
        object.__setattr__(self, "_encryptor", encryptor)

    def check(self, model: nn.Module, anatomy: Anatomy, stack: Sequence[Defense]) -> None:
        """Refuse a selection that encrypts nothing.

        `protect` also refuses one of which what stays plain gives the image away, by the analysis
        of `vitguard plan`, unless `force` is set.

        Raises:
            Incompatible: Nothing is selected.
            InputError: The selection cannot be read, or a part of it matches no parameter.
            MissingExtra: TenSEAL is not installed.
        """
        require_tenseal()
        require_selection(self.select, model, anatomy, stack, "encrypt")

    def traits(self, before: Traits, anatomy: Anatomy) -> Traits:
        """Return that the selected tensors cannot be read."""
        sealed = (*before.sealed, self.select)
        return replace(before, sealed=sealed, accepted=before.accepted or self.force)

    def leaves_out(self, frozen: Sequence[str]) -> Sequence[str]:
        """Return those that the encryptor's manifest has no room for."""
        encryptor: Encryptor | None = self._encryptor  # type: ignore[attr-defined]
        return () if encryptor is None else [n for n in frozen if n not in encryptor.manifest.names]

    def awaits(self) -> Sequence[str]:
        """Return the names in the manifest."""
        encryptor: Encryptor | None = self._encryptor  # type: ignore[attr-defined]
        return () if encryptor is None else encryptor.manifest.names

    def seal(self, update: Update, anatomy: Anatomy, draws: Draws) -> Update:
        """Return the update with the selected tensors sealed.

        Raises:
            Unprotected: The update contains nothing that the selection names; or there is no
                encryptor, and the guard is no rehearsal (its draws are secret).
            InputError: A value is not finite; or the encryptor's manifest names other tensors.
        """
        update, chosen = selected(self.select, update, anatomy, "encrypt", "encrypted")
        encryptor: Encryptor | None = self._encryptor  # type: ignore[attr-defined]
        if encryptor is not None:
            if differs := encryptor.manifest.difference(chosen):
                raise expected(
                    f"a manifest of the {len(chosen)} tensors that {self.select!r} selects",
                    f"one {differs}", _MAKE,
                )  # fmt: skip
            return encryptor.seal(update)
        if draws.seeded is None:
            raise Unprotected(
                "Expected an encryptor for an update that leaves, got none: the server could add "
                "nothing. Give EncryptedGradients(encryptor=Encryptor(keys, manifest, "
                "client_id=...)). An audit rehearses without one, and so does a guard that was "
                "given a generator."
            )
        values = sum(update.tensors[n].numel() for n in chosen)
        if values > self.rehearse:
            reason = (
                f"encrypted ({self.preset}) in a rehearsal without keys; no ciphertext was made "
                f"of its {values} values (rehearse={self.rehearse})"
            )
            return update.seal(dict.fromkeys(chosen, reason))
        return self._rehearsal(update, chosen, draws)

    def _rehearsal(self, update: Update, chosen: list[str], draws: Draws) -> Update:
        tensors = {n: update.tensors[n] for n in chosen}
        keys = KeySet.generate(preset=self.preset)
        manifest = Manifest.of(tensors, bounds=_own_bounds(tensors))
        encryptor = Encryptor(keys, manifest, client_id="rehearsal", generator=draws.seeded)
        with rounds.bound(rounds.Round(0, "")):  # one of its own, whatever round this is in
            sealed = encryptor.seal(update)
        reason = f"encrypted ({self.preset}) under a key that was thrown away"
        return sealed.seal(dict.fromkeys(chosen, reason))


_MAKE = (
    "Protect a copy of the model with the same stack without an encryptor, and make the manifest "
    "with Manifest.of(guard.encrypted(), bounds=...). "
    "A server's starting model needs the same defenses of the model."
)


def _own_bounds(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Bounds for a rehearsal only: those of a real run must not come from private values."""
    return {name: _largest(tensor) for name, tensor in tensors.items()}


def _largest(tensor: Tensor) -> float:
    largest = float(tensor.detach().abs().max()) if tensor.numel() else 0.0
    return max(largest, 1e-30) if largest > 0 or largest != largest else 1.0
