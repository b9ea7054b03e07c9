"""One message on its way through a client's app, and what the train function asks of it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Literal, ParamSpec, TypeVar

from flwr.app import Array, ArrayRecord, ConfigRecord, Context
from torch import Tensor

from vitguard.defenses.base import Ledgered, UpdateDefense
from vitguard.defenses.encryption import Encryptor
from vitguard.defenses.gate import LeakGate
from vitguard.errors import Incompatible, InputError, Unprotected, expected
from vitguard.federated.flower.changes import go_on, require_added
from vitguard.federated.flower.keys import ClientKeys
from vitguard.federated.flower.records import from_arrays
from vitguard.guard import Guard

__all__ = [
    "KEPT",
    "LOCAL",
    "Exchange",
    "attach",
    "current_exchange",
    "encryptor",
    "kept_locally",
]

KEPT, LOCAL = "vitguard.kept", "vitguard.local"  # records of context.state
P = ParamSpec("P")
R = TypeVar("R")


@dataclass
class _Ledger:
    """A client's privacy ledger as the server is told of it."""

    name: str
    releases: int


@dataclass
class Exchange:
    """One message on its way through the app."""

    context: Context
    keys: Callable[[Context], ClientKeys]
    received: Mapping[str, Array] = field(default_factory=dict)
    guards: list[Guard] = field(default_factory=list)
    batch: tuple[Tensor, Tensor] | None = None  # behind the update, for a gate
    reminder: ConfigRecord | None = None  # of the ledger, by the server
    ledger: _Ledger | None = None
    beside: dict[str, Array] = field(default_factory=dict)  # of the model, for the server to keep
    own: InputError | None = None  # raised by a function of this module, which quotes no data


current_exchange: ContextVar[Exchange | None] = ContextVar("vitguard_flower", default=None)


def _now() -> Exchange:
    found = current_exchange.get()
    if found is None:
        raise Unprotected(
            "Expected a message in a ClientApp with ProtectMod, got none: nothing would be "
            "protected. Make the app ClientApp(mods=[ProtectMod()]), first of all mods. Outside of "
            "an app, as for make_keys, leave the encryptor out of the stack."
        )
    return found


def _quoting_no_data(function: Callable[P, R]) -> Callable[P, R]:
    """Let the server read what an error of a function says: it is of keys, states and names."""

    @wraps(function)
    def noting(*args: P.args, **settings: P.kwargs) -> R:
        try:
            return function(*args, **settings)
        except InputError as error:
            _now().own = error
            raise

    return noting


@_quoting_no_data
def attach(guard: Guard, *, batch: tuple[Tensor, Tensor] | None = None) -> Guard:
    """Name the guard that seals this message's reply.

    Its ledger goes on from the last message, and so do the schedules of its defenses and the
    positions that it withholds.

    Call it once in the train function, after `protect` and before training.

    Args:
        batch: Images (model input) and labels behind the update, which a `LeakGate` needs; they go
            nowhere else.

    Raises:
        Unprotected: The app has no `ProtectMod`, or a guard was attached already; or the stack has
            a gate and there is no batch.
        InputError: A defense trains what the server does not share, or the ledger is another's.
    """
    exchange = _now()
    if exchange.guards:
        raise Unprotected("Expected one guard for a message, got a second. Attach it once.")
    if batch is None and any(isinstance(d, LeakGate) for d in guard.defenses):
        raise Unprotected(
            "Expected the images behind the update for the gate, got none. Call attach(guard, "
            "batch=(images, labels)), with all that the client trains on in this message."
        )
    for defense in guard.defenses:
        if isinstance(defense, UpdateDefense) and defense.feeds_back():
            raise Incompatible(
                f"Expected {defense.name} without feedback, got it with: what it cuts from updates "
                "is secret, and context.state is no place for it. Leave feedback out."
            )
    require_added(guard, exchange.received)
    exchange.batch = batch
    kept = exchange.context.state.config_records.get(KEPT, ConfigRecord())
    ledger = kept.get("guard")
    if isinstance(ledger, bytes):
        guard.load_state_bytes(ledger)
    if any(isinstance(d, Ledgered) for d in guard.defenses):
        exchange.ledger = _ledger(kept, exchange.reminder)
    go_on(guard, kept_locally(exchange))
    guard.will_seal()
    exchange.guards.append(guard)
    return guard


def kept_locally(exchange: Exchange) -> dict[str, Tensor]:
    """Return what the client goes on from, as it was at the end of the last message."""
    return from_arrays(exchange.context.state.array_records.get(LOCAL, ArrayRecord()))


def _ledger(kept: ConfigRecord, reminder: ConfigRecord | None) -> _Ledger:
    """Return the client's ledger by name, and how many releases it has counted.

    Raises:
        Unprotected: The server was told of more.
    """
    name, releases = kept.get("ledger", secrets.token_hex(16)), kept.get("releases", 0)
    if not isinstance(name, str) or not isinstance(releases, int):
        raise expected("a ledger's name and releases in context.state", type(releases).__name__)
    if reminder is not None:
        told = reminder.get("releases")
        if not (reminder.get("name") == name and isinstance(told, int) and told <= releases):
            raise Unprotected(
                f"Expected the privacy ledger that had counted {told} releases, got one of "
                f"{releases}: context.state was lost or set back. Put the newest one back; "
                "nothing is trained or sent until then."
            )
    return _Ledger(name, releases)


@_quoting_no_data
def encryptor(*, outliers: Literal["refuse", "clip"] = "refuse") -> Encryptor:
    """Return the encryptor of the client that this message is for.

    For `EncryptedGradients(encryptor=encryptor())` in the train function.

    Args:
        outliers: What becomes of values beyond their bound, as in `Encryptor`. The server is told
            how many were clipped, and refuses more than its `max_clipped`.
    """
    exchange = _now()
    return exchange.keys(exchange.context).encryptor(outliers=outliers)
