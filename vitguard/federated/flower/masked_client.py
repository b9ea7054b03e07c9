"""The client's side of masked rounds: it answers each phase, and rests in between, encrypted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from torch import Tensor

from vitguard.defenses.masking import MaskingClient
from vitguard.errors import Rejected, Unprotected, expected
from vitguard.federated.flower.masked_keys import MaskingIdentity
from vitguard.federated.flower.records import BASE, ROUND, RUN, started
from vitguard.rounds import Progress

__all__ = ["ASKED", "KEYS", "SHARES", "VALUES", "AGREEMENT", "ANSWERS", "BODY", "PHASE", "masker"]

ASKED = "vitguard"  # name of the ConfigRecord of a phase
PHASE, BODY = "vitguard-phase", "vitguard-body"  # in it
KEYS, SHARES, VALUES, AGREEMENT, ANSWERS = "keys", "shares", "values", "agreement", "answers"
_RESTING = "vitguard.masks"  # record of context.state


@dataclass(frozen=True)
class Asked:
    """What the server asks for: a phase of a round, and what it starts from."""

    phase: str
    round: Progress
    body: bytes
    client: MaskingClient
    name: object = b""  # of the round, as the server drew it

    def weights(self, received: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights if they are those that this client signed, with all others.

        Raises:
            Rejected: They are another model.
        """
        if started(received, self.name) != self.round.base:
            raise Rejected("base", "another model than the round was started with")
        return dict(received)


_asked: ContextVar[Asked | None] = ContextVar("vitguard_masks", default=None)


def asked_now() -> Asked | None:
    """Return what this message asks of the masks; None where it asks nothing."""
    return _asked.get()


def masker(*, outliers: Literal["refuse", "clip"] = "refuse") -> MaskingClient:
    """Return the masking client that this message is for.

    For `MaskedAggregation(client=masker())` in the train function.

    Args:
        outliers: What becomes of values beyond their bound, as in `MaskingClient`. The server is
            told how many were clipped, and refuses more than its `max_clipped`.

    Raises:
        Unprotected: The message is of no masked round.
    """
    if outliers not in ("refuse", "clip"):
        raise expected("outliers 'refuse' or 'clip'", repr(outliers)[:80])
    now = asked_now()
    if now is None:
        raise Unprotected(
            "Expected a message of MaskedFedAvg to a ClientApp with ProtectMod, got another: "
            "nothing would be masked."
        )
    now.client.outliers = outliers
    return now.client


@contextmanager
def masking(
    message: Message, context: Context, identity: Callable[[Context], MaskingIdentity]
) -> Iterator[Message | None]:
    """Answer a short phase of a masked round; None where the app must answer.

    Raises:
        Rejected: The server asks for what must not be answered.
    """
    found = {k: v for record in message.content.config_records.values() for k, v in record.items()}
    if PHASE not in found:
        yield None
        return
    phase, number, base = found[PHASE], found.get(ROUND), found.get(BASE)
    body = found.get(BODY, b"")
    if message.metadata.message_type.split(".")[0] != MessageType.TRAIN:
        raise Rejected("type", "a masked round in another message", "a train message")
    if not (type(number) is int and isinstance(base, str) and isinstance(body, bytes)):
        raise Rejected("round", "a phase without number or version", "MaskedFedAvg's message")
    client = identity(context).masker()
    resting = context.state.config_records.get(_RESTING, ConfigRecord()).get("state")
    if resting is not None:
        client.load_state_bytes(resting)  # type: ignore[arg-type]
    now = Asked(str(phase), Progress(number, base), body, client, found.get(RUN))
    token = _asked.set(now)
    try:
        yield _answered(now, message)
    finally:  # whatever was signed or masked stays so
        _asked.reset(token)
        context.state[_RESTING] = ConfigRecord({"state": client.state_bytes()})


def _answered(now: Asked, message: Message) -> Message | None:
    client = now.client
    if now.phase == KEYS:
        body = client.start_round(now.round.opened, weight=None, base=now.round.base)
    elif now.phase == SHARES:
        body = client.share_keys(now.body)
    elif now.phase == VALUES:
        client.take_shares(now.body)
        return None
    elif now.phase == AGREEMENT:
        body = client.agree(now.body)
    elif now.phase == ANSWERS:
        body = client.answer(now.body)
    else:
        raise Rejected("phase", f"{now.phase[:40]!r}", "a phase of a masked round")
    return Message(content=RecordDict({ASKED: ConfigRecord({BODY: body})}), reply_to=message)
