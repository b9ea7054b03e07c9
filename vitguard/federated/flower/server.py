"""The server's side: federated averaging of updates that it cannot read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from logging import WARNING
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

from vitguard.defenses.encryption import Aggregator, worst_error
from vitguard.errors import Incompatible, Rejected, VitguardError, expected
from vitguard.federated.flower.adding import (
    aggregate_metrics,
    evaluated,
    refuse_other_strategies,
    refuse_reserved_keys,
    refuse_reserved_settings,
    require_finite_start,
    require_tensors,
    warn_of_coarse,
    with_common_names,
)
from vitguard.federated.flower.arrivals import Arrivals
from vitguard.federated.flower.changes import spelled
from vitguard.federated.flower.grid import InProcessGrid
from vitguard.federated.flower.keys import Federation
from vitguard.federated.flower.ledgers import LedgerGrid, Ledgers, without_ledgers
from vitguard.federated.flower.records import (
    BASE,
    ROUND,
    SNAPSHOT,
    VOUCH,
    WEIGHTED,
    History,
    Step,
    drawn_name,
    from_arrays,
    take_snapshot,
)
from vitguard.federated.flower.replies import PlainSum, Reply, in_one_line
from vitguard.federated.flower.snapshots import Snapshot

__all__ = ["EncryptedFedAvg"]


class EncryptedFedAvg(FedAvg):
    """Federated averaging of sealed updates; each reply is taken or refused by itself.

    Guarantees:
        A reply that is refused leaves the sum as it was; `refused` says why, for each node that is
        not in the sum.
        Fewer than `min_clients` good replies leave the model as it was, with one clear line.
        A node gets the sums that it lacks, or the model that a client sealed and the sums since.
        Replies are added as they arrive and never kept, and no more than `catch_up` sums are, as
        long as clients seal the model when they are asked.
        A client whose privacy ledger did not grow is refused (`LedgerGrid`); for a server that
        restarts save `ledgers`.
        What a client sealed in another run counts for nothing, with the same keys and weights too:
        each run has a name, drawn at its start, which every message is bound to.
        A sealed model is taken only where most clients of the round vouch for the same weights.
        Metrics of one client end no run: those that differ in kind or are not finite are left out,
        and so is an evaluation without a weight.

    Does not protect against:
        A server that works with a client: they share the key of the ciphertext.
        A client that is asked to seal the model and seals another: no node takes it for the model,
        but those that lack sums before it are refused until the next one is sealed.

    The result's arrays are the starting weights, the sealed model and the sums since: save them,
    and give them as `initial_arrays` to go on after a restart. Only clients can open them.

    Args:
        federation: The server's keys, such as `Federation.from_environment()`.
        min_clients: The fewest clients of a sum, at least 2.
        max_clipped: The most values of a reply that were moved to their bound; None for any.
        catch_up: Sums that are kept before a client is asked to seal the model, at least 1. It
            sends 4 bytes a value, once in so many rounds; a sum has about 8.
        settings: Arguments of `FedAvg`; at least `min_clients` nodes are asked by default.
    """

    def __init_subclass__(cls) -> None:
        refuse_other_strategies(cls, EncryptedFedAvg)

    def __init__(
        self,
        federation: Federation,
        *,
        min_clients: int = 2,
        max_clipped: int | None = None,
        catch_up: int = 4,
        **settings: Any,
    ) -> None:
        if not isinstance(federation, Federation):
            raise expected(
                "a Federation, of Federation.from_environment", type(federation).__name__
            )
        if type(min_clients) is not int or not 2 <= min_clients <= federation.keys.max_clients:
            raise expected(
                f"min_clients from 2 to {federation.keys.max_clients}", repr(min_clients)
            )
        if type(catch_up) is not int or catch_up < 1:
            raise expected("catch_up, a whole number of sums, at least 1", repr(catch_up)[:80])
        refuse_reserved_keys(settings)
        if settings.get("train_metrics_aggr_fn") is None:
            settings["train_metrics_aggr_fn"] = aggregate_metrics
        for name in ("min_train_nodes", "min_available_nodes"):
            settings.setdefault(name, min_clients)
        super().__init__(**settings)
        self._catch_up = catch_up
        self._federation, self.min_clients = federation, min_clients
        self._max_clipped = max_clipped
        self._started = False
        self._history = History({})
        self._known: dict[int, int] = {}  # the last round that a node has opened
        self._sender: int | None = None  # the node that is asked to seal the model
        self.refused: dict[int, dict[int, str]] = {}
        self.ledgers = Ledgers()

    def start(self, grid: Grid, initial_arrays: ArrayRecord, *args: Any, **named: Any) -> Result:
        """Run the rounds, as every strategy does; `evaluate_fn` cannot read the model."""
        if named.get("evaluate_fn") is not None or len(args) > 4:
            raise Incompatible(
                "Expected evaluation by clients, got evaluate_fn: the server cannot read the model."
            )
        refuse_reserved_settings(args, named)
        history = History.of(initial_arrays)
        if not (history.steps or history.snapshot):  # no client has opened anything of it
            history = replace(history, run=drawn_name())
        require_tensors(self._federation.manifest, history.start)
        require_finite_start(history.start)
        self._history, self._known = history, {}
        grid, self.ledgers = without_ledgers(grid, self.ledgers)
        single = grid if isinstance(grid, InProcessGrid) else Arrivals(grid)
        counting = LedgerGrid(single, self.ledgers)
        self._started = True
        try:
            result = super().start(counting, initial_arrays, *args, **named)
        finally:
            self._started = False
        made = self._history
        summed = made.steps or made.snapshot  # before that there is nothing to go on from
        result.arrays = (made if summed else replace(made, run=b"")).record()
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nodes for sealed updates of the model's version; each is sent what it lacks."""
        if not self._started:
            raise Incompatible(
                "Expected EncryptedFedAvg.start, got a strategy around it, which would read or "
                "change what is encrypted. Use EncryptedFedAvg alone; for differential privacy "
                "put ClientPrivacy before the encryption in the clients' stack."
            )
        said = self._said(config)
        asked = len(self._history.steps) >= self._catch_up
        if asked:
            said[SNAPSHOT] = "vouch"
        messages = list(super().configure_train(server_round, arrays, said, grid))
        lacks = self._lacking(messages)
        sender = messages[0].metadata.dst_node_id if asked and messages else None  # a random one
        self._sender = sender
        asks = ConfigRecord({**said, SNAPSHOT: "send"})
        return [
            self._with(m, lacks, asks if m.metadata.dst_node_id == sender else None)
            for m in messages
        ]

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let nodes evaluate the model, which they open themselves."""
        said = self._said(config)
        messages = list(super().configure_evaluate(server_round, arrays, said, grid))
        lacks = self._lacking(messages)
        return [self._with(m, lacks) for m in messages]

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Average the metrics of the good replies; bad ones are left out, each with one line."""
        made = self.evaluate_metrics_aggr_fn
        return evaluated(server_round, replies, self.weighted_by_key, made)

    def _said(self, config: ConfigRecord) -> ConfigRecord:
        return ConfigRecord(
            {
                **config,
                ROUND: self._history.next_round,
                BASE: self._history.version(),
                WEIGHTED: self.weighted_by_key,
            }
        )

    def _lacking(self, messages: Iterable[Message]) -> dict[int | None, ArrayRecord]:
        """Return what nodes lack, once for all that know the same round: the bytes are shared."""
        known = {self._known.get(m.metadata.dst_node_id) for m in messages}
        return {number: self._history.since(number).record() for number in known}

    def _with(
        self,
        message: Message,
        lacks: dict[int | None, ArrayRecord],
        config: ConfigRecord | None = None,
    ) -> Message:
        node = message.metadata.dst_node_id
        content = {**message.content, self.arrayrecord_key: lacks[self._known.get(node)]}
        if config is not None:
            content[self.configrecord_key] = config
        return Message(
            content=RecordDict(content),
            dst_node_id=node,
            message_type=message.metadata.message_type,
        )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Add the good replies. Bad ones are refused, each with its reason in `refused`."""
        number, keys = self._history.next_round, self._federation
        total = Aggregator(
            keys.keys, keys.manifest, signing=keys.signing,
            round_id=number, base=self._history.version(),
        )  # fmt: skip
        names = keys.manifest.names
        sealed = {*names, *spelled(self._history.start, names).values()}
        plain = PlainSum(self._history.start, sealed)
        good: dict[int, MetricRecord] = {}
        models = Vouched(number - 1, self._history.version())
        refused = self.refused[server_round] = {}
        for reply in replies:
            node = reply.metadata.src_node_id
            try:
                self._add(reply, total, plain, models)
            except VitguardError as refusal:
                said = in_one_line(refusal)  # the exception itself holds the reply
                log(WARNING, "Round %s: node %s refused: %s", server_round, node, said)
                if node not in good:  # else it was another answer of a node that counts
                    refused[node] = said
                    self._known.pop(node, None)  # whatever it has: it gets everything
            else:
                (good[node],) = reply.content.metric_records.values()
                refused.pop(node, None)  # of an old answer that came before this one
                self._known[node] = number - 1
            del reply  # its ciphertext goes before the next one comes
        try:
            summed = total.finish(min_clients=self.min_clients)
        except Rejected as refusal:
            log(WARNING, "Round %s failed, the model is as it was: %s", server_round, str(refusal))
            return None, None
        weights = list(total.weights.values())
        weight, heaviest = math.fsum(weights), keys.manifest.max_weight
        error = worst_error(1.0, keys.keys, weights, max_weight=heaviest)
        warn_of_coarse(server_round, error, heaviest)
        step = Step(number, summed, plain.mean(weight))
        self._history = self._history.after(step, models.agreed())
        return self._history.record(), self.train_metrics_aggr_fn(
            with_common_names(server_round, list(good.values())), self.weighted_by_key
        )

    def _add(self, message: Message, total: Aggregator, plain: PlainSum, models: Vouched) -> None:
        """Add a reply to the sum and to what is plain, or neither.

        Raises:
            VitguardError: Why it was refused.
        """
        reply = Reply.of(message, weighted_by=self.weighted_by_key, max_clipped=self._max_clipped)
        if not 0 < reply.weight <= self._federation.manifest.max_weight:
            raise Rejected("weight", f"a weight of {reply.weight}", "one that the manifest allows")
        proof, snapshot = reply.arrays.pop(VOUCH, None), take_snapshot(reply.arrays)
        if snapshot is not None and message.metadata.src_node_id != self._sender:
            raise Rejected("snapshot", "a sealed model of a node that was not asked for one")
        changes = from_arrays(reply.arrays)
        plain.check(changes)
        before = total.weights
        total.add(reply.sealed, weight=reply.weight)
        (proved,) = (w for c, w in total.weights.items() if c not in before)
        plain.add(changes, proved)  # by the weight that the client's key proved
        models.add(b"" if proof is None else proof.data, snapshot)


@dataclass
class Vouched:
    """What the clients of a round say of the model that the round began with.

    Args:
        number, version: Of that model.
    """

    number: int
    version: str
    proofs: Counter[bytes] = field(default_factory=Counter)
    snapshot: Snapshot | None = None

    def add(self, proof: bytes, snapshot: Snapshot | None) -> None:
        """Count one client's proof, and keep the model that it sealed, if it is the one meant."""
        self.proofs[proof] += 1
        if snapshot and (snapshot.number, snapshot.version) == (self.number, self.version):
            self.snapshot = snapshot

    def agreed(self) -> Snapshot | None:
        """Return the model, if more than half of the clients have its weights; None otherwise."""
        if self.snapshot is None:
            return None
        votes, clients = self.proofs[self.snapshot.proof], self.proofs.total()
        if 2 * votes <= clients:
            log(WARNING, "A sealed model is refused: %s of %s clients have it", votes, clients)
            return None
        return self.snapshot
