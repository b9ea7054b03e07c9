"""A client that looks at the weights it was given, and refuses the round where they are crafted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitguard.defenses.base import Defense, Draws, Installed, ModelDefense
from vitguard.defenses.steps import watch_steps
from vitguard.errors import SuspiciousWeights, Unprotected, VitguardError, expected
from vitguard.inspection import Inspection, Memory, Recorder, inspect_weights, weights_of
from vitguard.inspection.look import buffer_signs, require_blocks
from vitguard.inspection.memory import Traces
from vitguard.inspection.recorder import gated_layers
from vitguard.inspection.rows import finite, fresh_generator
from vitguard.vit import Anatomy

__all__ = ["InspectWeights"]

Noted = tuple[list[str], Tensor]
"""Names of weights, and a summary of their values."""
Looked = tuple[Inspection, Traces, Noted]

_ROUNDING = 1e-6
_STEP = 0.5
"""Relative change of all weights' summaries beyond which no optimizer step explains it."""


@dataclass(frozen=True)
class InspectWeights(ModelDefense):
    """Look at weights that arrive, and refuse the round where they have signs of a known craft.

    The weights alone are looked at before the first training pass on them: then nothing was
    computed. The shares of single patches and images are read off that pass while it runs, and
    judged before an update leaves. Every loaded state dict and every update begins a new round.

    Guarantees:
        No training pass runs on weights that are suspicious by themselves, and nothing leaves.
        No update leaves of a round whose first gradient is suspicious.
        What was not inspected does not leave.
        The model computes as it does without it, and evaluation is never refused.

    Does not protect against:
        Crafts that stay below the limits, as docs/inspection.md measures. What the first passes
        compute is local, but a refusal tells the server that there were signs, and those of the
        gradient depend on the images. Batches of a round after its first one are not looked at.
        Weights that are written in place right after an optimizer step and differ little from
        those before it; a gradient that another, unprotected model computed.

    Args:
        limit: Factor on the limits of all signs, above 0; inf inspects nothing.

    Raises:
        InputError: A limit that is not above 0.
    """

    name: ClassVar[str] = "inspect"
    limit: float = 1.0

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise expected("limit above 0", self.limit)

    def check(self, model: nn.Module, anatomy: Anatomy, stack: Sequence[Defense]) -> None:
        """Raise Incompatible where the blocks are not known, in which crafts would stand."""
        require_blocks(anatomy)

    def known(self) -> Defense:
        """Return one that inspects nothing: the adversary need not refuse itself."""
        return replace(self, limit=math.inf)

    def audit_note(self) -> str:
        """Say what an inspection leaves open."""
        return "inspect: it knows the signs of published crafts. It is no guarantee against others."

    def install(self, model: nn.Module, anatomy: Anatomy, draws: Draws) -> InstalledInspection:
        return InstalledInspection(self, model, anatomy)


class InstalledInspection(Installed):
    """The hooks of an inspection, and how far it is with the weights that are there."""

    def __init__(self, settings: InspectWeights, model: nn.Module, anatomy: Anatomy) -> None:
        super().__init__()
        self.settings, self.anatomy = settings, anatomy
        self.recorder = Recorder(anatomy.prefix_tokens)
        self.found: Inspection | None = None
        """Of the weights alone; None while they have not been looked at."""
        self.traces: Traces = {}
        self.signs: dict[int, Tensor] = {}
        """Random signs by number of columns."""
        self.noted: Noted = [], torch.zeros(0)
        """The weights as they were last seen here: what is otherwise arrived, or was trained."""
        self.stepping = False
        """Whether an optimizer has stepped the model since."""
        self.left = False
        """Whether an update of this round has left."""
        self.handles: list[Any] = []
        if self._acts():
            self.handles = self.recorder.attach(model, anatomy)
            self.handles.append(model.register_forward_pre_hook(_Before(self)))
            watch_steps(self, model)
        self.register_load_state_dict_post_hook(_arrived)

    def _acts(self) -> bool:
        return math.isfinite(self.settings.limit)

    def uninstall(self, model: nn.Module) -> None:
        for handle in self.handles:
            handle.remove()

    def begin(self) -> None:
        """Begin a round: other weights are there."""
        self.found, self.left, self.traces = None, False, {}
        self.recorder.drop()

    def verify(self, model: nn.Module) -> None:
        """Look at the weights where a round begins; each pass looks whether others came since.

        Raises:
            SuspiciousWeights: They have signs of a craft.
            Unprotected: They cannot be inspected.
        """
        if self._acts() and (self.found is None or self.left):
            self._inspect(model)

    def _inspect(self, model: nn.Module) -> None:
        self.begin()
        found, traces, noted = _or_refuse(lambda: self._look(model))
        if found.suspicious:
            raise SuspiciousWeights(
                f"Expected weights without signs of a craft, got {found.reason}. Nothing was "
                "computed with them; leave the round out, and ask who runs the server.",
                found,
            )
        self.found, self.traces = found, traces
        self.noted, self.stepping = noted, False
        self.recorder.arm()

    def intact(self, model: nn.Module) -> None:
        pass  # what training left behind is judged by `releasing`

    def passing(self, model: nn.Module) -> None:
        """A pass with a gradient begins: it is read where it is the first one of a round."""
        watch_steps(self, model)  # a copy came without
        if self.found is None or self.left or self._replaced(model):
            self._inspect(model)
        elif self.recorder.finished:
            self.recorder.armed = False
        elif self.recorder.overflowed:
            self.recorder.arm()

    def stepped(self) -> None:
        """Note that an optimizer is about to step the model."""
        self.stepping = True

    def left_out(self) -> bool:
        """Whether an optimizer that leaves out what a defense added is refused here: pieces do."""
        return False

    def _replaced(self, model: nn.Module) -> bool:
        """Whether other weights are there than were seen last, by what no optimizer step explains.

        A step moves weights by a small part of their size; nobody knows of smaller writes after it.
        """
        now = self._summaries(weights_of(model))
        (names, new), (known, old) = now, self.noted
        if names != known or new.shape != old.shape:
            return True
        most = _STEP if self.stepping else _ROUNDING
        if not bool((new - old).square().sum() <= most**2 * old.square().sum()):
            return True
        self.noted, self.stepping = now, False
        return False

    def _summaries(self, weights: Mapping[str, Tensor]) -> Noted:
        """Return each row of each weight added up with random signs: a write of others shows.

        Vectors, such as biases, as they are.
        """
        found = []
        with torch.no_grad():
            for weight in weights.values():
                rows = weight.float()
                if rows.dim() > 1:
                    rows = rows.flatten(1)
                    rows = rows @ self._signs_for(rows.shape[1]).to(rows.device)
                found.append(rows.reshape(-1).cpu())
        return list(weights), torch.cat(found).double()

    def _signs_for(self, size: int) -> Tensor:
        if size not in self.signs:
            drawn = torch.randint(0, 2, (size,), generator=fresh_generator())
            self.signs[size] = drawn.float() * 2 - 1
        return self.signs[size]

    def releasing(self, model: nn.Module) -> None:
        """Judge what the first pass showed.

        Raises:
            SuspiciousWeights: The gradient has signs of a craft.
            Unprotected: The weights or the gradient were not inspected.
        """
        if not self._acts():
            return
        if self.found is not None and self._replaced(model):
            self.begin()  # written over since the last pass
        if self.found is None:
            raise Unprotected(
                "Expected an update of weights that were inspected when they arrived, got one of "
                "others. Train the protected model itself, in training mode."
            )
        signs = self.recorder.signs()
        if not self.recorder.finished and gated_layers(model, self.anatomy):
            raise Unprotected(
                "Expected a training pass whose gradient was inspected, got none of the protected "
                "model since the weights arrived, or none with finite values. Train it in training "
                "mode, by calling it."
            )
        found = self.found.and_also(signs, self.recorder.notes())
        if found.suspicious:  # no numbers: they come from the images
            names = ", ".join(s.name for s in found.worst)
            raise SuspiciousWeights(
                "Expected gradients that no single patch or image dominates, got signs of crafted "
                f"weights ({names}). Nothing has left; leave the round out.",
                found,
            )
        if not self.left:
            memory_of(model).accept(self.traces)
        self.left = True

    def _look(self, model: nn.Module) -> Looked:
        weights, memory = weights_of(model), memory_of(model)
        noted = self._summaries(weights)
        found = inspect_weights(
            weights, self.anatomy, memory,
            limit=self.settings.limit,
            traces=(traces := memory.traces(weights, self.anatomy)),
            numbers=finite(noted[1]),  # what is none stays so in a sum
        )  # fmt: skip
        return found.and_also(*buffer_signs(model)), traces, noted


def memory_of(model: nn.Module) -> Memory:
    """Return what the client of a protected model remembers."""
    return model.get_submodule("vitguard").memory  # type: ignore[return-value]


def _or_refuse(look: Callable[[], Looked]) -> Looked:
    try:
        return look()
    except VitguardError:
        raise
    except Exception as error:
        raise Unprotected(
            f"Expected weights that can be inspected, got {type(error).__name__}: {error}"
        ) from error


def _arrived(module: nn.Module, incompatible_keys: Any) -> None:
    assert isinstance(module, InstalledInspection)
    module.begin()


class _Before:
    """Before a pass of the model: only one that takes gradients in training mode is inspected."""

    def __init__(self, piece: InstalledInspection) -> None:
        self.piece = piece

    def __call__(self, module: nn.Module, args: Any) -> None:
        if module.training and torch.is_grad_enabled():
            self._begin(module)  # pyright: ignore[reportCallIssue]

    @torch.compiler.disable
    def _begin(self, module: nn.Module) -> None:
        self.piece.passing(module)
