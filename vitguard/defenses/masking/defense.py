"""Masked aggregation: the update leaves under masks that cancel in the sum alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, replace
from typing import ClassVar

from torch import nn

from vitguard.core import Traits, Update
from vitguard.defenses.base import Defense, Draws, UpdateDefense
from vitguard.defenses.masking.client import MaskingClient
from vitguard.defenses.masking.secret_sharing import require_masking
from vitguard.defenses.sealing import require_selection, selected
from vitguard.errors import Unprotected, expected
from vitguard.vit import Anatomy

__all__ = ["MaskedAggregation"]


@dataclass(frozen=True)
class MaskedAggregation(UpdateDefense):
    """Mask chosen tensors of the update; the server reads their sum and no single one.

    Guarantees:
        A sealed tensor cannot be read from the update: `read` raises Blocked.
        The sum of quantised values is exact.

    Does not protect against:
        The sum, which the server reads as well as the clients do. Few clients, or one whose weight
        is far above the others': the sum is then nearly one update.
        What stays plain: `vitguard plan` says which exact attacks remain for a selection.

    Args:
        select: `all`, `plan`, a role, a regular expression, or several joined by `/`, as in
            `EncryptedGradients`.
        force: Accept a selection under which an attack that gives the image back remains.
        client: A `MaskingClient`, which must have its shares of the round when the update leaves;
            without one no update leaves outside an audit, or a guard whose draws come from a
            generator. It is no setting: it is in no repr, spec, report or pickle.

    Examples:
        >>> MaskedAggregation(select="plan").spec()
        'masking:select=plan'

    References:
        Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine Learning,
        CCS 2017, figure 4, with the consistency check of its active variant.
    """

    name: ClassVar[str] = "masking"
    promise: ClassVar[str] = "the server reads the sum of the clients, and no single update"
    select: str = "all"
    force: bool = False
    client: InitVar[MaskingClient | None] = None

    def __post_init__(self, client: MaskingClient | None) -> None:
        if not self.select:
            raise expected("a selection of parameters", "an empty one")
        if client is not None and not isinstance(client, MaskingClient):
            raise expected("a MaskingClient", type(client).__name__)
        object.__setattr__(self, "_client", client)

    def check(self, model: nn.Module, anatomy: Anatomy, stack: Sequence[Defense]) -> None:
        """Refuse a selection that masks nothing.

        Raises:
            Incompatible: Nothing is selected.
            InputError: The selection cannot be read, or a part of it matches no parameter.
            MissingExtra: pycryptodome or cryptography is not installed.
        """
        require_masking()
        require_selection(self.select, model, anatomy, stack, "mask")

    def traits(self, before: Traits, anatomy: Anatomy) -> Traits:
        """Return that the selected tensors cannot be read."""
        sealed = (*before.sealed, self.select)
        return replace(before, sealed=sealed, accepted=before.accepted or self.force)

    def leaves_out(self, frozen: Sequence[str]) -> Sequence[str]:
        """Return those that the client's manifest has no room for."""
        client: MaskingClient | None = self._client  # type: ignore[attr-defined]
        return () if client is None else [n for n in frozen if n not in client.terms.manifest.names]

    def awaits(self) -> Sequence[str]:
        """Return the names in the manifest."""
        client: MaskingClient | None = self._client  # type: ignore[attr-defined]
        return () if client is None else client.terms.manifest.names

    def seal(self, update: Update, anatomy: Anatomy, draws: Draws) -> Update:
        """Return the update with the selected tensors sealed.

        Raises:
            Unprotected: The update contains nothing that the selection names; or there is no
                client in the phase of values, and the guard is no rehearsal.
            InputError: A value is not finite or beyond its bound; or the manifest names others.
        """
        update, chosen = selected(self.select, update, anatomy, "mask", "masked")
        client: MaskingClient | None = self._client  # type: ignore[attr-defined]
        if client is not None:
            if differs := client.terms.manifest.difference(chosen):
                raise expected(
                    f"a manifest of the {len(chosen)} tensors that {self.select!r} selects",
                    f"one {differs}",
                    "Make it of what the same stack selects without a client.",
                )
            return client.seal(update)
        if draws.seeded is None:
            raise Unprotected(
                "Expected a masking client for an update that leaves, got none. Give "
                "MaskedAggregation(client=MaskingClient(terms, identity, client_id=...)). An audit "
                "rehearses without one, and so does a guard that was given a generator."
            )
        reason = "masked in a rehearsal without other clients; no message was made"
        return update.seal(dict.fromkeys(chosen, reason))
