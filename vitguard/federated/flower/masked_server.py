"""The server's side: federated averaging of updates under masks, which only their sum loses."""

from __future__ import annotations

import math
from collections.abc import Iterable
from logging import WARNING
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

from vitguard.defenses.masking import MaskingServer
from vitguard.errors import Incompatible, Rejected, expected
from vitguard.federated.flower.adding import (
    aggregate_metrics,
    evaluated,
    refuse_other_strategies,
    refuse_reserved,
    refuse_reserved_keys,
    refuse_reserved_settings,
    require_finite_start,
    require_tensors,
    warn_of_coarse,
    with_common_names,
)
from vitguard.federated.flower.arrivals import Arrivals
from vitguard.federated.flower.grid import InProcessGrid
from vitguard.federated.flower.ledgers import Ledgers, without_ledgers
from vitguard.federated.flower.masked_keys import MaskedFederation
from vitguard.federated.flower.masked_round import MaskedRound
from vitguard.federated.flower.records import (
    BASE,
    ROUND,
    RUN,
    WEIGHTED,
    drawn_name,
    from_arrays,
    started,
    to_arrays,
)

__all__ = ["MaskedFedAvg"]


class MaskedFedAvg(FedAvg):
    """Federated averaging under masks: the server reads the average, and no single update.

    Each round has five exchanges with the nodes: keys, shares, values (the training), agreement on
    who is in the sum, answers. A node that is silent in one is left out of those after it.

    Guarantees:
        A reply that is refused leaves the sum as it was; `refused` says why, for each node.
        Fewer clients than the threshold in a phase leave the model as it was, with one clear line.
        Replies are added as they arrive and never kept.
        A client whose privacy ledger did not grow is refused (`LedgerGrid`); for a server that
        restarts save `ledgers`.
        What a client said in another run or round counts for nothing, with the same keys and model
        too: each round has a name, drawn at its start, which every message is bound to.
        All clients of a sum trained the same model: each signs the version of the one it was sent.
        Metrics of one client end no run: those that differ in kind or are not finite are left out,
        and so is an evaluation without a weight.

    Does not protect against:
        What the sum tells, which the server reads; put `ClientPrivacy` before the masks.
        More clients working with the server than `terms.colluding`.

    Args:
        federation: The server's key and the terms, such as `MaskedFederation.from_environment()`.
        max_clipped: The most values of a reply that were moved to their bound; None for any.
        first_round: Number of the first round; clients take part in each number once. After a
            restart within one Flower run, give the `next_round` of the strategy before.
        phase_timeout: Seconds that nodes have for each exchange but the training. A SuperNode may
            start a process of the app for each, which takes seconds.
        wrapped: Whether another strategy is around this one and reads no single update, such as
            `DifferentialPrivacyClientSideFixedClipping`. Without it any strategy around it is
            refused before anything is sent; with it one that reads updates ends in a TypeError,
            since their arrays hold no numbers.
        settings: Arguments of `FedAvg`; at least `threshold` nodes are waited for by default.
    """

    def __init_subclass__(cls) -> None:
        refuse_other_strategies(cls, MaskedFedAvg)

    def __init__(
        self,
        federation: MaskedFederation,
        *,
        max_clipped: int | None = None,
        first_round: int = 1,
        phase_timeout: float = 300.0,
        wrapped: bool = False,
        **settings: Any,
    ) -> None:
        if not isinstance(federation, MaskedFederation):
            raise expected(
                "a MaskedFederation, as of MaskedFederation.from_environment",
                type(federation).__name__,
            )
        if type(first_round) is not int or first_round < 0:
            raise expected("first_round, a whole number of at least 0", repr(first_round)[:80])
        if not isinstance(wrapped, bool):
            raise expected("wrapped, True or False", repr(wrapped)[:80])
        refuse_reserved_keys(settings)
        least = federation.terms.threshold
        for name in ("min_train_nodes", "min_available_nodes"):
            settings.setdefault(name, least)
        if settings.get("train_metrics_aggr_fn") is None:
            settings["train_metrics_aggr_fn"] = aggregate_metrics
        super().__init__(**settings)
        self._federation, self._max_clipped = federation, max_clipped
        self._phase_timeout = phase_timeout
        self._wrapped, self._started = wrapped, False
        self._now: MaskedRound | None = None
        self.next_round = first_round
        self.refused: dict[int, dict[int, str]] = {}
        self.ledgers = Ledgers()

    def start(self, grid: Grid, initial_arrays: ArrayRecord, *args: Any, **named: Any) -> Result:
        """Run the rounds, as every strategy does.

        Raises:
            InputError: The model lacks a tensor of the manifest, or has it in another shape; or a
                setting has a name of vitguard's own.
        """
        refuse_reserved_settings(args, named)
        require_tensors(self._federation.terms.manifest, initial_arrays)
        require_finite_start(from_arrays(initial_arrays))
        grid, self.ledgers = without_ledgers(grid, self.ledgers)
        single = grid if isinstance(grid, InProcessGrid) else Arrivals(grid)
        self._started = True
        try:
            result = super().start(single, initial_arrays, *args, **named)
        finally:
            self._started = False
        if not result.arrays:  # every round failed
            result.arrays = initial_arrays
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Exchange keys and shares with the nodes; ask those that did both for masked updates."""
        if not (self._started or self._wrapped):
            raise Incompatible(
                f"Expected {type(self).__name__}.start, got a strategy around it, which may read "
                "single updates: they are masked. Let clients clip or put ClientPrivacy before "
                "the masks; a strategy that reads none (DifferentialPrivacyClientSide...) works "
                "with wrapped=True."
            )
        refuse_reserved("train_config", config)  # where another strategy was started
        self._now = None
        refused = self.refused[server_round] = {}
        messages = list(super().configure_train(server_round, arrays, config, grid))
        if not messages:
            return []
        start, number = from_arrays(arrays), self.next_round
        self.next_round += 1
        name, keys = drawn_name(), self._federation
        base = started(start, name)
        require_tensors(keys.terms.manifest, start)
        now = MaskedRound(
            MaskingServer(keys.terms, signing=keys.signing, round_id=number, base=base),
            grid,
            {ROUND: number, BASE: base, RUN: name, WEIGHTED: self.weighted_by_key},
            start,
            refused,
            self.weighted_by_key,
            self._max_clipped,
            self._phase_timeout,
        )
        try:
            training = now.begin(messages)
        except Rejected as refusal:
            self._failed(server_round, refusal)
            return []
        self._now = now
        return [self.ledgers.reminding(m) for m in training]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Add the good replies and have the masks taken off their sum."""
        now, self._now = self._now, None
        if now is None:
            return None, None
        now.add(map(self.ledgers.counted, replies))
        try:
            weights = now.finish()
        except Rejected as refusal:
            self._failed(server_round, refusal)
            return None, None
        terms, given = self._federation.terms, list(now.server.weights.values())
        heaviest = terms.manifest.max_weight
        error = len(given) / terms.levels * heaviest / math.fsum(given)
        warn_of_coarse(server_round, error, heaviest)
        contents = with_common_names(server_round, now.metrics)
        return to_arrays(weights), self.train_metrics_aggr_fn(contents, self.weighted_by_key)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Average the metrics of the good replies; bad ones are left out, each with one line."""
        made = self.evaluate_metrics_aggr_fn
        return evaluated(server_round, replies, self.weighted_by_key, made)

    def _failed(self, server_round: int, refusal: Rejected) -> None:
        log(WARNING, "Round %s failed, the model is as it was: %s", server_round, refusal)
