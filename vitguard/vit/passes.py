"""A pass through the model: its class scores, and attention that can be derived twice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends import cuda as backends

from vitguard.errors import Incompatible, VitguardError, expected

__all__ = ["checkpoints_refused", "drops_patches", "logits_of", "loss_of", "math_attention"]


@contextmanager
def checkpoints_refused() -> Iterator[None]:
    """Say what to do where activations are checkpointed so that no gradient can be asked for.

    Raises:
        Incompatible: The block met checkpoints that enter autograd again.
    """
    try:
        yield
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise Incompatible(
            "Expected checkpoints of activations that do not enter autograd again, got "
            "use_reentrant=True. Give torch.utils.checkpoint use_reentrant=False; in transformers "
            'model.gradient_checkpointing_enable({"use_reentrant": False}).'
        ) from error


def drops_patches(model: nn.Module) -> bool:
    """Whether a training pass leaves out some patches of each image (timm's `patch_drop_rate`)."""
    layers = (m for m in model.modules() if type(m).__name__.startswith("PatchDropout"))
    return any(float(getattr(layer, "prob", 1)) > 0 for layer in layers)


def logits_of(output: Any) -> Tensor:
    """Return the class scores of a model's output: a tensor, or an object with `.logits`."""
    if isinstance(output, Tensor):
        return output
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    raise expected("a model that returns class scores", type(output).__name__)


def loss_of(loss: Any, scores: Tensor, labels: Tensor, *, graded: bool = True) -> Tensor:
    """Return `loss(scores, labels)`, one number with a gradient; anything if not `graded`.

    Raises:
        InputError: `loss` is no function, does not take both, or returns something else.
    """
    sizes = f"scores of shape {tuple(scores.shape)} and labels of shape {tuple(labels.shape)}"
    if isinstance(loss, type) or not callable(loss):
        raise expected(
            "loss(scores, labels), a function", repr(loss),
            "Give a function or an instance, such as nn.CrossEntropyLoss().",
        )  # fmt: skip
    entropy = loss is F.cross_entropy or type(loss) is nn.CrossEntropyLoss
    if entropy and scores.dim() == 2 and scores.shape[1] == 1:  # zero, whatever the score is
        raise expected(
            "at least two classes for cross-entropy", "a model with one, which it never moves",
            "Give the loss that is trained, such as loss=nn.BCEWithLogitsLoss().",
        )  # fmt: skip
    try:
        found: Any = loss(scores, labels)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        elsewhere = labels.device != scores.device  # said by who knows the model
        known = isinstance(error, VitguardError | torch.OutOfMemoryError)
        if known or elsewhere or not _of_torch(error):
            raise
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise expected(f"a loss that takes {sizes}", f"an error of it: {first}") from error
    single = isinstance(found, Tensor) and found.numel() == 1
    if graded and not (single and found.requires_grad >= scores.requires_grad):
        got = f"{type(found).__name__} of shape {tuple(getattr(found, 'shape', ()))}"
        raise expected(
            f"a loss that is one number with a gradient, for {sizes}",
            f"{got}{' without one' if single else ''}",
            "Take the mean over the batch: reduction='mean'.",
        )  # fmt: skip
    return found


def _of_torch(error: Exception) -> bool:
    """Whether torch raised it, or the call itself: what a user's own lines raise stays theirs."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    return where == __name__ or where.partition(".")[0] == "torch"


_MATH_LOCK = threading.Lock()
_math_users = 0
_kernels: dict[Callable[[bool], None], bool] = {}


@contextmanager
def math_attention() -> Iterator[None]:
    """Use the attention kernel that has a second derivative, inside the block only.

    The switch is one for the whole process, so threads share it: the first to enter turns it, the
    last to leave puts it back.
    """
    global _math_users, _kernels
    with _MATH_LOCK:
        if _math_users == 0:
            _kernels = {
                backends.enable_flash_sdp: backends.flash_sdp_enabled(),
                backends.enable_mem_efficient_sdp: backends.mem_efficient_sdp_enabled(),
                backends.enable_cudnn_sdp: backends.cudnn_sdp_enabled(),
                backends.enable_math_sdp: backends.math_sdp_enabled(),
            }
            for enable in _kernels:
                enable(enable is backends.enable_math_sdp)
        _math_users += 1
    try:
        yield
    finally:
        with _MATH_LOCK:
            _math_users -= 1
            if _math_users == 0:
                for enable, before in _kernels.items():
                    enable(before)
