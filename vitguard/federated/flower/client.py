"""The client's side: a mod around the app that opens what comes and seals what leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from logging import ERROR, WARNING

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, RecordDict
from flwr.common.logger import log
from flwr.common.serde import make_message
from torch import Tensor

from vitguard.core import Update
from vitguard.defenses.base import Ledgered
from vitguard.defenses.encryption import Decryptor
from vitguard.defenses.sealing import require_finite
from vitguard.errors import GateClosed, InputError, Rejected, Unprotected, VitguardError, expected
from vitguard.federated.flower.changes import changes_of, local_of, moved, spelled, with_local
from vitguard.federated.flower.exchange import (
    KEPT,
    LOCAL,
    Exchange,
    attach,
    current_exchange,
    encryptor,
    kept_locally,
)
from vitguard.federated.flower.keys import ClientKeys
from vitguard.federated.flower.ledgers import LEDGER
from vitguard.federated.flower.masked_client import ASKED, asked_now, masking
from vitguard.federated.flower.masked_keys import MaskingIdentity
from vitguard.federated.flower.records import (
    BASE,
    ROUND,
    SEALED,
    SNAPSHOT,
    VOUCH,
    WEIGHTED,
    History,
    from_arrays,
    sealed_array,
    snapshot_array,
    started,
    to_arrays,
)
from vitguard.federated.flower.snapshots import Snapshot, vouch
from vitguard.federated.weights import images_behind
from vitguard.rounds import Progress

__all__ = ["ProtectMod", "attach", "encryptor"]

_MODEL = "vitguard.model"  # record of context.state, beside those of exchange
_EXAMPLES = "num-examples"
_REFUSED = 201  # code of an Error reply, among those that Flower leaves to users
App = Callable[[Message, Context], Message]


class ProtectMod:
    """The outermost mod of a client app. What it cannot protect is answered by an Error.

    Guarantees:
        No reply to a train message holds an array that the attached guard did not seal.
        A reply without an attached guard, or an exception in the app, becomes an Error reply that
        holds none of the app's values.
        What the app trained is sent or refused: a change of a tensor that the guard does not share
        becomes an Error reply.
        No plain weights leave that are not finite.
        Schedules of defenses and withheld positions go on over messages, as ledgers do.

    Does not protect against:
        What the app puts in its metrics, or writes to the network by itself.

    Args:
        keys: Where a client's keys come from; by default files that the environment names.
        identity: The same for rounds of `MaskedFedAvg`.
    """

    def __init__(
        self,
        keys: Callable[[Context], ClientKeys] = ClientKeys.from_environment,
        *,
        identity: Callable[[Context], MaskingIdentity] = MaskingIdentity.from_environment,
    ) -> None:
        self._keys, self._identity = keys, identity

    def __call__(self, message: Message, context: Context, call_next: App) -> Message:
        outer = current_exchange.get()
        if outer is not None and outer.context is context:  # a federation inside is another's
            raise Unprotected(
                "Expected ProtectMod once for a message, got it twice. Leave one out."
            )
        exchange = Exchange(context, self._keys)
        token = current_exchange.set(exchange)
        try:
            with masking(message, context, self._identity) as answer:
                return answer or _exchanged(message, exchange, call_next)
        except Exception as error:  # noqa: BLE001 - whatever it was, nothing unsealed may leave
            # an error of the app may quote its data; of our own, `_answer` sees to those that do
            told = isinstance(error, VitguardError)
            said = f": {error}"[:500] if told else " in the app"
            if isinstance(error, GateClosed):  # how well an attack sees them is told to nobody
                said = ": the client's gate did not let the update leave"
                log(WARNING, "%s", error)
            elif not told:  # it stays in the client's own log, where Flower leaves it otherwise
                log(ERROR, "The app raised an exception; no text of it is sent", exc_info=error)
            return Message(Error(_REFUSED, type(error).__name__ + said), reply_to=message)
        finally:
            current_exchange.reset(token)


def _exchanged(message: Message, exchange: Exchange, call_next: App) -> Message:
    training = message.metadata.message_type.split(".")[0] == MessageType.TRAIN
    if not training and not message.content.array_records:  # such as a query
        return _without_arrays(_answer(call_next, message, exchange))
    name, received = _only(message.content.array_records, "ArrayRecord of weights")
    before, settings = _opened(message, received, exchange)
    plain = settings is None or asked_now() is not None  # then they are as they came
    given = received if plain else to_arrays(before)
    # of these the server knows the beginning
    if local := with_local(before, kept_locally(exchange)):
        given = ArrayRecord({**given, **to_arrays(local)})
    content = RecordDict({**message.content, name: given})
    exchange.reminder = content.config_records.get(LEDGER)
    content.pop(LEDGER, None)
    if asked_now() is not None:  # Flower's own mods take a message with one ConfigRecord
        content.pop(ASKED, None)
    exchange.received = given
    inner = make_message(message.metadata, content)
    reply = _answer(call_next, inner, exchange)
    if not training:
        return _without_arrays(reply)
    _require_answer(reply)
    if not exchange.guards:
        raise Unprotected(
            "Expected attach(guard) in the train function, got none: nothing was sealed."
        )
    return _sealed(reply, message, before, settings, exchange)


def _answer(call_next: App, message: Message, exchange: Exchange) -> Message:
    """Return the app's reply. What it was given wrongly may be its data: labels, names of files."""
    try:
        return call_next(message, exchange.context)
    except InputError as error:
        if error is exchange.own:
            raise
        log(ERROR, "The app was given what it does not take; no text of it is sent: %s", error)
        raise expected("input that the app takes", "other: its own log has more") from error


def _require_answer(reply: Message) -> None:
    if reply.has_error():  # of a mod, or of the app: what it says may quote data
        log(ERROR, "The app answered with an error, which is not sent: %s", reply.error.reason)
        raise Rejected("app", "an error in the app", "a reply")


def _without_arrays(reply: Message) -> Message:
    _require_answer(reply)
    if reply.content.array_records:
        raise Unprotected("Expected arrays in replies to train messages only, got others.")
    return reply


def _opened(
    message: Message, received: ArrayRecord, exchange: Exchange
) -> tuple[dict[str, Tensor], Progress | None]:
    """Return the weights that a message stands for, and the round it asks for where it is secret.

    Without a round the strategy is Flower's own and the weights are plain.
    """
    if (masked := asked_now()) is not None:
        return masked.weights(from_arrays(received)), masked.round
    config = {k: v for record in message.content.config_records.values() for k, v in record.items()}
    if ROUND not in config:
        return from_arrays(received), None
    number, base = config[ROUND], config.get(BASE)
    if type(number) is not int or not isinstance(base, str):
        raise Rejected("round", "a round without number or version", "EncryptedFedAvg's message")
    asked = Progress(number, base)
    history, state = History.of(received), exchange.context.state
    keys = exchange.keys(exchange.context)
    weights: dict[str, Tensor] = {}
    progress = Progress()
    if _MODEL in state.array_records:
        weights = from_arrays(state.array_records[_MODEL])
        kept = state.config_records.get(KEPT, ConfigRecord())
        progress = Progress.from_json(str(kept.get("progress", "")))
    if history.start and progress.opened < 0:  # perhaps of a run that begins again
        weights = dict(history.start)
        progress = Progress(-1, started(weights, history.run))
    whole = history.snapshot
    if whole is not None and whole.number > progress.opened:
        weights = whole.open(keys.keys, keys.manifest)
        progress = progress.after(whole.number, whole.version)
    if not weights:
        raise Rejected("base", "later steps alone, for a client that has no weights", "all of them")
    for step in history.steps:
        if step.number <= progress.opened:
            continue
        opener = Decryptor(
            keys.keys, keys.manifest, min_clients=keys.min_clients, opened=progress.opened
        )
        average = opener.decrypt(step.total, round_id=step.number, base=progress.base)
        spelling = spelled(weights, average)
        sealed = {spelling.get(name, name): change for name, change in average.items()}
        for name, change in {**step.plain, **sealed}.items():
            if name not in weights or weights[name].shape != change.shape:
                raise Rejected("array", f"a step of {name}, which the model lacks")
            weights[name] = moved(weights[name], change)
        progress = progress.after(step.number, step.version(progress.base))
    if progress.base != base:
        raise Rejected("base", "steps that lead to another version of the model")
    state[_MODEL] = to_arrays(weights)
    _keep(exchange, progress=progress.to_json())
    wanted = config.get(SNAPSHOT)
    if wanted in ("vouch", "send") and progress.opened < 0:
        raise Rejected("snapshot", "a request for the model before any round", "one after it")
    if wanted in ("vouch", "send"):
        facts = keys.keys, keys.manifest, progress.opened, progress.base, weights
        exchange.beside = {VOUCH: sealed_array(vouch(*facts))}
        if wanted == "send":
            exchange.beside |= snapshot_array(Snapshot.of(*facts))
    return weights, asked


def _sealed(
    reply: Message,
    message: Message,
    before: Mapping[str, Tensor],
    asked: Progress | None,
    exchange: Exchange,
) -> Message:
    """Return the reply with the sealed difference in place of the weights."""
    guard = exchange.guards[0]
    name, record = _only(reply.content.array_records, "ArrayRecord of weights in the reply")
    changes, spelling = changes_of(guard, before, from_arrays(record))
    if stray := next(iter(reply.content.config_records), None):
        raise expected(
            "a reply of weights and metrics alone", f"the ConfigRecord {stray!r:.80} as well",
            "It would not be sent: numbers go into the metrics.",
        )  # fmt: skip
    metrics_name, metrics = _only(reply.content.metric_records, "MetricRecord in the reply")
    weight = _number(metrics, _weighted_by(message) if asked else _EXAMPLES)
    images = weight if _EXAMPLES not in metrics else _number(metrics, _EXAMPLES)
    update = Update(changes, kind="difference", batch_size=images_behind(images))
    number, base = (asked.opened, asked.base) if asked else (0, "")
    try:
        with guard.round(number, base=base, weight=weight):
            sealed = guard.seal(update, batch=exchange.batch)
    finally:  # a release that was counted stays counted
        _keep(exchange, guard=guard.state_bytes(draws=False))
        if exchange.ledger is not None:
            exchange.ledger.releases += 1
            _keep(exchange, ledger=exchange.ledger.name, releases=exchange.ledger.releases)
        exchange.context.state[LOCAL] = to_arrays(local_of(guard))
    if spent := [d.name for d in guard.defenses if isinstance(d, Ledgered)]:
        metrics["epsilon"] = max(float(guard.privacy_spent(n).epsilon) for n in spent)
    arrays = _leaving(sealed, before, spelling, secret=asked is not None)
    if asked is not None:
        arrays = ArrayRecord({**arrays, **exchange.beside})
        metrics["vitguard-clipped"] = sum(sealed.clipped.values())
    content = RecordDict({name: arrays, metrics_name: metrics})
    if exchange.ledger is not None:
        content[LEDGER] = ConfigRecord(asdict(exchange.ledger))
    return Message(content=content, reply_to=message)


def _weighted_by(message: Message) -> str:
    """Return the metric that a strategy of vitguard takes for the weight."""
    said = (r.get(WEIGHTED) for r in message.content.config_records.values())
    return next((name for name in said if isinstance(name, str)), _EXAMPLES)


def _number(metrics: Mapping, name: str) -> float:
    value = metrics.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise expected(f"{name} among the metrics", repr(value)[:80])
    return value


def _leaving(
    sealed: Update, before: Mapping[str, Tensor], spelling: Mapping[str, str], *, secret: bool
) -> ArrayRecord:
    """Return what leaves: ciphertext beside plain differences, or whole plain weights.

    Args:
        spelling: Names in messages, by those of the update.

    Raises:
        Unprotected: The stack and the server's strategy do not fit.
        InputError: A plain value is not finite.
    """
    if secret != bool(sealed.payloads):
        raise Unprotected(
            "Expected EncryptedFedAvg with an encrypting stack, or a stock strategy with another, "
            f"got {'no ciphertext' if secret else 'ciphertext for a stock strategy'}."
        )
    if not secret:  # what is not sent stays as the server knows it
        plain = {spelling[n]: moved(before[spelling[n]], t) for n, t in sealed.tensors.items()}
        require_finite(replace(sealed, tensors=plain))
        return to_arrays({**before, **plain})
    (payload,) = sealed.payloads.values()
    plain = {spelling[n]: t for n, t in sealed.tensors.items() if t.is_floating_point()}
    return ArrayRecord({SEALED: sealed_array(payload), **to_arrays(plain)})


def _keep(exchange: Exchange, **values: str | bytes | int) -> None:
    state = exchange.context.state
    state[KEPT] = ConfigRecord({**state.config_records.get(KEPT, {}), **values})


def _only(records: Mapping, what: str) -> tuple:
    if len(records) != 1:
        raise expected(f"one {what}", len(records))
    ((name, record),) = records.items()
    return name, record
