"""What the strategies that add sealed updates share: checks, and metrics of several clients."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from logging import WARNING
from typing import Any

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp.strategy import FedAvg, FedProx, Strategy
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
from torch import Tensor

from vitguard.defenses.encryption import Manifest
from vitguard.errors import Incompatible, Rejected, VitguardError, expected
from vitguard.federated.flower.changes import spelled
from vitguard.federated.flower.replies import content_of, in_one_line

__all__ = [
    "aggregate_metrics",
    "evaluated",
    "refuse_other_strategies",
    "refuse_reserved",
    "refuse_reserved_keys",
    "refuse_reserved_settings",
    "require_finite_start",
    "require_tensors",
    "warn_of_coarse",
    "with_common_names",
]

Aggregate = Callable[[list[RecordDict], str], MetricRecord]
EPSILON, CLIPPED = "epsilon", "vitguard-clipped"
_COARSE = 0.01
_RESERVED = ("vitguard-", "vitguard.")  # how all names begin that messages say things by


def refuse_other_strategies(kind: type, own: type) -> None:
    """Raise Incompatible if a subclass of `own` is a strategy of another kind as well.

    Such a strategy reads each update, or replaces the average: neither works on sealed values.
    """
    readers = [
        base.__name__
        for base in kind.__mro__
        if issubclass(base, Strategy)
        and not issubclass(base, own)
        and base not in (FedAvg, FedProx, Strategy)  # FedProx tells clients a number, no more
    ]
    if readers:
        raise Incompatible(
            f"Expected a strategy that adds updates, got {readers[0]}, which must read each update "
            f"or replaces the average. Use {own.__name__} alone."
        )


def refuse_reserved_keys(settings: Mapping[str, Any]) -> None:
    """Raise InputError where FedAvg's key of a record or a weight is a name of vitguard's own."""
    for which in ("weighted_by_key", "arrayrecord_key", "configrecord_key"):
        refuse_reserved(which, [settings.get(which, "")])


def refuse_reserved_settings(args: Sequence[Any], named: Mapping[str, Any]) -> None:
    """Raise InputError where a run's settings for clients have a name of vitguard's own.

    Each client would take it for the word of the strategy.

    Args:
        args, named: Of `Strategy.start`, after the grid and the arrays.
    """
    given = inspect.signature(Strategy.start).bind(None, None, None, *args, **named).arguments
    for which in ("train_config", "evaluate_config"):
        refuse_reserved(which, given.get(which) or ConfigRecord())


def refuse_reserved(which: str, names: Iterable[str]) -> None:
    """Raise InputError where one of the names is one of vitguard's own.

    Args:
        which: The setting that they are in.
    """
    for name in names:
        if name == _RESERVED[0][:-1] or str(name).startswith(_RESERVED):
            raise expected(
                f"{which} of names of your own", f"{name!r:.80}, by which vitguard's strategy and "
                "its clients speak to each other",
                "Rename it: names that begin with vitguard- or vitguard. are taken.",
            )  # fmt: skip


def require_finite_start(weights: Mapping[str, Tensor]) -> None:
    """Raise InputError where weights to start from are not finite: no client would train them."""
    for name, tensor in weights.items():
        if not bool(tensor.isfinite().all()):
            raise expected(
                f"finite starting weights of {name}", "inf or NaN",
                "Start from another checkpoint: no average can mend them.",
            )  # fmt: skip


def warn_of_coarse(server_round: int, error: float, max_weight: float) -> None:
    """Log one line where an average may be off by a hundredth of its bound, or more.

    Args:
        error: The largest possible one, as a share of the bound.
    """
    if error > _COARSE:
        log(
            WARNING, "Round %s: the average may be off by %.2g of each bound, since the weights "
            "are far below max_weight %g. Make keys with the largest weight there is.",
            server_round, error, max_weight,
        )  # fmt: skip


def require_tensors(manifest: Manifest, shapes: Mapping[str, Any]) -> None:
    """Raise InputError where a model lacks a tensor of the manifest, or has it in another shape.

    Args:
        shapes: What has a `shape`, by the names in messages.
    """
    spelling = spelled(shapes, manifest.names)
    for entry in manifest.entries:
        name = spelling.get(entry.name)
        if name is None or tuple(shapes[name].shape) != entry.shape:
            raise expected(
                f"a model with {entry.name} of shape {entry.shape}, as in the manifest",
                "none" if name is None else f"one of shape {tuple(shapes[name].shape)}",
                "Make the manifest of the model that the clients protect, and start from the "
                "state dict of that model.",
            )  # fmt: skip


def aggregate_metrics(contents: list[RecordDict], weighted_by: str) -> MetricRecord:
    """Return the metrics of several clients as one record, for `train_metrics_aggr_fn`.

    Averages weighted by `weighted_by`, as Flower makes them; but `epsilon` is the largest of all
    clients, whose average would be spent by none, and `vitguard-clipped` the sum.
    """
    together = aggregate_metricrecords(contents, weighted_by)
    of_all: dict[str, Callable[[list[float]], float]] = {EPSILON: max, CLIPPED: math.fsum}
    for name, one in of_all.items():
        found = [r[name] for c in contents for r in c.metric_records.values() if name in r]
        numbers = [float(value) for value in found if not isinstance(value, list)]
        if numbers and len(numbers) == len(found):
            together[name] = one(numbers)
    return together


def with_common_names(server_round: int, contents: list[MetricRecord]) -> list[RecordDict]:
    """Return metrics of several clients with the names that all have: others cannot be averaged.

    Nor can a number with a list, lists of several lengths, or what is not finite.
    """
    names = set.intersection(*(set(c) for c in contents))
    alike = {n for n in names if len({_length(c[n]) for c in contents}) == 1}
    if wrong := sorted(n for n in alike if not all(_finite(c[n]) for c in contents)):
        log(
            WARNING, "Round %s: metrics of a client that are not finite are left out: %s",
            server_round, in_one_line(", ".join(wrong)),
        )  # fmt: skip
    alike -= {*wrong}
    return [
        RecordDict({"metrics": MetricRecord({n: c[n] for n in c if n in alike})}) for c in contents
    ]


def _finite(value: Any) -> bool:
    return all(math.isfinite(v) for v in (value if isinstance(value, list) else [value]))


def _length(value: Any) -> int | None:
    return len(value) if isinstance(value, list) else None


def evaluated(
    server_round: int, replies: Iterable[Message], weighted_by: str, aggregate: Aggregate
) -> MetricRecord | None:
    """Return what the good replies of an evaluation say together, None where there is none.

    A reply that is an error, has no weight above 0, or is a node's second, is left out with one
    line in the log.
    """
    by_node: dict[int, MetricRecord] = {}
    for reply in replies:
        node = reply.metadata.src_node_id
        try:
            if node in by_node:
                raise Rejected("replay", "a second answer of the node")
            by_node[node] = _measured(reply, weighted_by)
        except VitguardError as refusal:
            said = in_one_line(refusal)
            log(WARNING, "Round %s: evaluation of node %s: %s", server_round, node, said)
    good = list(by_node.values())
    return aggregate(with_common_names(server_round, good), weighted_by) if good else None


def _measured(reply: Message, weighted_by: str) -> MetricRecord:
    found = list(content_of(reply).metric_records.values())
    if len(found) != 1:
        raise Rejected("records", f"{len(found)} records of metrics", "one")
    weight = found[0].get(weighted_by)
    if not (isinstance(weight, int | float) and 0 < weight < math.inf):
        raise Rejected("weight", f"{weighted_by} of {weight!r:.80}", "a number above 0")
    return found[0]
