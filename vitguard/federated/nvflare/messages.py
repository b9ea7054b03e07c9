"""What may be in a message of NVFlare: exact shapes, and nothing that is not named here."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# nvflare and flwr need not be installed together
from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from nvflare.apis.dxo import DXO, from_shareable
from nvflare.apis.fl_constant import FLContextKey, FLMetaKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable
from nvflare.app_common.abstract.fl_model import MetaKey
from nvflare.app_common.app_constant import AppConstants
from torch import Tensor

from vitguard.errors import Rejected, Unprotected

__all__ = [
    "CLIPPED",
    "MESSAGE",
    "SUM",
    "bare",
    "failed",
    "metrics_of",
    "refuse_tensors",
    "require_train",
    "round_of",
    "sole_dxo",
    "sum_name",
    "sums_in",
    "tensors_of",
    "weight_of",
]

MESSAGE = "vitguard.message"
"""Name of a client's message, where NVFlare expects parameters."""
SUM = "vitguard.sum."
"""Start of the name of a sum; the number of its round follows."""
CLIPPED = "vitguard-clipped"
"""Name in the meta of a result: how many values were moved to their bound."""
_PLAIN = (str, bool, int, float, type(None))
_HEADERS = (
    AppConstants.CURRENT_ROUND,
    AppConstants.NUM_ROUNDS,
    AppConstants.START_ROUND,
    ReservedHeaderKey.COOKIE_JAR,
    ReservedHeaderKey.RC,
    ReservedHeaderKey.CONTENT_TYPE,
)


def require_train(fl_ctx: FLContext, task: str) -> None:
    """Refuse every task but the one that vitguard protects.

    Raises:
        Unprotected: Another task, such as one that submits a plain model.
    """
    name = fl_ctx.get_prop(FLContextKey.TASK_NAME)
    if name != task:
        raise Unprotected(f"Expected the task {task!r}, got {name!r}. No other task is protected.")


def sole_dxo(shareable: object, kind: str) -> DXO:
    """Return the one DXO of a message, of the one kind that is due.

    Raises:
        Unprotected: It is anything else.
    """
    if not isinstance(shareable, Shareable):
        raise Unprotected(f"Expected a Shareable, got {type(shareable).__name__}.")
    try:
        dxo = from_shareable(shareable)
    except (ValueError, TypeError, KeyError) as error:
        raise Unprotected("Expected a message with a DXO, got one without.") from error
    known = {ReservedHeaderKey.HEADERS, "DXO"}
    if strangers := sorted(str(k) for k in shareable.keys() - known):
        raise Unprotected(f"Expected a DXO and headers alone, got {strangers[0]} as well.")
    if dxo.data_kind != kind:
        raise Unprotected(
            f"Expected a DXO of kind {kind}, got {dxo.data_kind}. "
            "Send FLModel(params=difference, params_type=ParamsType.DIFF)."
        )
    if not isinstance(dxo.data, dict):
        raise Unprotected(f"Expected tensors by name, got {type(dxo.data).__name__}.")
    return dxo


def tensors_of(dxo: DXO) -> dict[str, Tensor]:
    """Return the tensors in a DXO.

    Raises:
        Unprotected: Something else is there, such as a NumPy array, which NVFlare drops under
            the PyTorch exchange.
    """
    for name, value in dxo.data.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise Unprotected(
                f"Expected torch tensors by name, got {type(value).__name__} for {name!r}."
            )
    if not dxo.data:
        raise Unprotected("Expected tensors by name, got none.")
    return dict(dxo.data)


def weight_of(dxo: DXO) -> float:
    """Return the weight that a client's training states.

    Raises:
        Unprotected: It states none, or no finite number above 0.
    """
    stated: Any = dxo.meta.get(FLMetaKey.NUM_STEPS_CURRENT_ROUND)
    weight = _number(stated)
    if weight is None or not (math.isfinite(weight) and weight > 0):
        raise Unprotected(
            f"Expected a weight above 0 in meta[{FLMetaKey.NUM_STEPS_CURRENT_ROUND!r}], "
            f"got {repr(stated)[:80]}. Give one number: int(weight)."
        )
    return weight


def _number(value: Any) -> float | None:
    """Return a number as float64; None for anything else, and for integers beyond it."""
    if isinstance(value, np.generic):  # what a mean or a sum of NumPy is
        value = value.item()
    try:
        return float(value) if type(value) in (int, float) else None
    except OverflowError:
        return None


def round_of(shareable: Shareable) -> int:
    """Return the round that a message of the server belongs to.

    Raises:
        Rejected: It names none.
    """
    number = shareable.get_header(AppConstants.CURRENT_ROUND)
    if type(number) is not int or number < 0:
        raise Rejected("round", f"a task of round {number!r}", "a task that names its round")
    return number


def sum_name(number: int) -> str:
    """Return the name under which the sum of a round travels."""
    return f"{SUM}{number}"


def sums_in(dxo: DXO) -> dict[int, bytes] | None:
    """Return the sums in a DXO by round, in order; None where it holds tensors.

    Raises:
        Rejected: Something else is there, or sums and tensors together.
    """
    if not any(isinstance(name, str) and name.startswith(SUM) for name in dxo.data):
        return None
    sums = {}
    for name, value in dxo.data.items():
        number = name.removeprefix(SUM) if isinstance(name, str) else ""
        if not (number.isascii() and number.isdigit()) or sum_name(int(number)) != name:
            raise Rejected("type", f"{str(name)[:80]!r} beside encrypted sums")
        if not isinstance(value, bytes):
            raise Rejected("type", f"{type(value).__name__} where bytes were due")
        sums[int(number)] = value
    return dict(sorted(sums.items()))


def refuse_tensors(tensors: dict[str, Tensor]) -> None:
    """Raise Rejected for values that are not finite."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise Rejected("range", f"{name} with values that are not finite", "finite weights")


def bare(shareable: Shareable) -> Shareable:
    """Return a new message with the known headers of another; none of its content.

    Raises:
        Unprotected: A header holds more than numbers and words.
    """
    clean = Shareable()
    for name in _HEADERS:
        value = shareable.get_header(name)
        if value is not None:
            _require_plain(name, value)
            clean.set_header(name, value)
    return clean


def failed(shareable: object) -> Shareable | None:
    """Return the bare reply of a client whose training failed; None where it did not."""
    if not isinstance(shareable, Shareable):
        return None
    code = shareable.get_return_code(ReturnCode.OK)
    return None if code == ReturnCode.OK else bare(shareable)


def metrics_of(dxo: DXO) -> dict[str, float]:
    """Return the numbers among the metrics of a reply, which stay plain.

    Raises:
        Unprotected: A metric is anything but a number.
    """
    metrics = dxo.meta.get(MetaKey.INITIAL_METRICS)
    metrics = {} if metrics is None else metrics  # an array has no truth value
    if not isinstance(metrics, dict) or any(_number(v) is None for v in metrics.values()):
        raise Unprotected("Expected metrics that are numbers, got something else.")
    return {str(name): float(_number(value) or 0.0) for name, value in metrics.items()}


def _require_plain(name: str, value: Any, depth: int = 0) -> None:
    if isinstance(value, dict) and depth < 4:
        for key, inner in value.items():
            _require_plain(name, key, depth + 1)
            _require_plain(name, inner, depth + 1)
    elif isinstance(value, list | tuple) and depth < 4:
        for inner in value:
            _require_plain(name, inner, depth + 1)
    elif not isinstance(value, _PLAIN) or (isinstance(value, str) and len(value) > 4096):
        raise Unprotected(f"Expected numbers and words in header {name}, got something else.")
