"""A patch shuffle in place: the hooks, the unknown embedding and the DAL head."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vitguard.defenses.base import Draws, hooks_gone
from vitguard.defenses.protection import Protection
from vitguard.defenses.shuffle import masks
from vitguard.defenses.shuffle.hooks import Hooked, hook
from vitguard.defenses.shuffle.localization import LocalizationHead, dal_weight, localization_loss
from vitguard.defenses.shuffle.parts import (
    mark,
    unwatch_parts,
    unwatched_gradient,
    watch_parts,
)
from vitguard.defenses.shuffle.settings import ShuffleSettings
from vitguard.defenses.steps import gradient_left
from vitguard.errors import Incompatible, Unprotected, expected
from vitguard.vit import Anatomy

__all__ = ["InstalledShuffle"]

# what one forward leaves behind: draws are secret, so none of it is copied or pickled
_FORWARD = ("_mask", "_source", "_begun", "_outputs", "_losses")


class InstalledShuffle(Hooked):
    """Lives at `model.vitguard.shuffle`.

    The patch embedding's hook draws and remembers the tokens z; the hook before the module that
    takes the embedded sequence puts z[source] + unknown into the masked slots, so that a masked
    slot never saw its own position. On a model without positions the first hook does both.
    """

    watches_steps = True
    unknown: nn.Parameter

    def __init__(
        self, model: nn.Module, anatomy: Anatomy, draws: Draws, settings: ShuffleSettings
    ) -> None:
        super().__init__()
        self.anatomy, self.draws, self.settings = anatomy, draws, settings
        self.unknown = nn.Parameter(_start(model, anatomy))
        self.head: LocalizationHead | None = None
        if settings.dal != "none" and settings.dal_head != "pca":
            head = LocalizationHead(anatomy.width, settings.dal_head, draws.public_generator())
            self.head = head.to(self.unknown)
        if settings.steps or settings.warmup:
            self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.forwards = 0
        self.exposed = False  # a gradient was taken through a forward that did not shuffle
        self._idle = False  # the last gradient was one
        self._left_out_at: int | None = None
        self._trained: set[int] = set()
        self._stepped_at = 0  # the forward that was counted last
        self._unread = False
        self._keys: Tensor | None = None
        self._pinned: Tensor | None = None
        # position embedding of the last forward; in a tuple, because a module registers parameters
        self._rows: tuple[Tensor, ...] = ()
        self._warned = False
        self._passing: frozenset[int] = frozenset()  # threads in a pass of the whole model
        self._forget()
        self.handles: list[Any] = []
        try:
            for handle in hook(self, model):
                self.handles.append(handle)
            watch_parts(self, model)
        except BaseException:
            self.uninstall(model)
            raise

    def _forget(self) -> None:
        for name in _FORWARD:
            setattr(self, name, None)

    def __getstate__(self) -> dict[str, Any]:
        forgotten = dict.fromkeys((*_FORWARD, "_keys", "_pinned")) | {"_rows": ()}
        fresh = {"_unread": False, "_idle": False, "_passing": frozenset()}
        return {**self.__dict__, **forgotten, **fresh}

    def uninstall(self, model: nn.Module) -> None:
        for handle in self.handles:
            handle.remove()
        unwatch_parts(self, model)

    def verify(self, model: nn.Module) -> None:
        self.intact(model)
        if not self.training:
            raise Unprotected(
                "Expected a model in training mode, got one in eval mode, where patches are not "
                "shuffled. Call model.train() before the gradient is taken."
            )

    def intact(self, model: nn.Module) -> None:
        # an evaluation after training takes no gradient: `settle` knows of one that did
        if hooks_gone(self.handles):
            raise Unprotected(
                "Expected the shuffle's hooks on the model, got some that are gone: something "
                "cleared the hooks or replaced a part. Protect the model again, after that."
            )

    def enter(self) -> None:
        self._passing |= {threading.get_ident()}

    def exit(self) -> None:
        self._passing -= {threading.get_ident()}

    def whole_pass(self) -> bool:
        return threading.get_ident() in self._passing

    def expose(self) -> None:
        self.exposed = self._idle = True

    def arrived(self) -> None:
        self.exposed = self._idle = False  # what was done to the weights before will not be sent

    def settle(self) -> None:
        self._require_read("the update was sealed")
        if self.exposed:
            raise Unprotected(
                "Expected gradients of shuffled images only, got one that was taken in eval mode, "
                "or of a part of the model on features that were not shuffled, since the weights "
                "were loaded. Train the whole model in training mode, attack or evaluate a copy, "
                "and load the weights again."
            )

    def truth(self) -> Mapping[str, Tensor]:
        """Return the last draw: `shuffled` (batch, N), and `source` (batch, N), who sits where."""
        if self._mask is None or self._source is None:
            return {}
        return {"shuffled": self._mask.cpu(), "source": self._source.cpu()}

    def one_draw(self) -> bool:
        return self.settings.draw == "batch"

    def key_examples(self, keys: Int[Tensor, " batch"] | None) -> None:
        """Draw each example of the next forwards from its own key; None for fresh draws again.

        The same key gives the same mask and permutation in any batch, which sensitivity tests
        need; equal keys give the whole batch one mask (also over several micro-batches).
        """
        self._keys = None if keys is None else keys.detach().cpu().to(torch.int64)

    def pin(self, shuffled: Bool[Tensor, "batch patches"] | None) -> None:
        self._pinned = None if shuffled is None else shuffled.detach().cpu().bool()

    def abandon(self) -> None:
        self._forget()
        self._rows, self._unread = (), False

    # what training leaves behind

    def auxiliary_loss(self) -> Tensor | None:
        losses = self.per_example_auxiliary()
        if losses is None:
            return None
        return losses.mean() if len(losses) else losses.sum()  # of no example: zero

    def per_example_auxiliary(self) -> Float[Tensor, " batch"] | None:
        """Return each example's weighted DAL loss of the last training forward; read once.

        Their mean is `auxiliary_loss()`.
        """
        self.finish()
        losses, self._losses, self._unread = self._losses, None, False
        return losses

    def finish(self) -> Tensor | None:
        """Compute and return the DAL losses once the forward has left what they need."""
        if not self._unread or self._losses is not None or self._mask is None:
            return self._losses
        vectors = self._localized()
        if vectors is None:
            raise Unprotected(
                f"Expected the forward of the whole model for DAL over {self.settings.dal}, got a "
                "part of it. Call the model itself."
            )
        self._rows, self._outputs = (), None
        vectors = vectors.expand(len(self._mask), -1, -1)
        losses = localization_loss(vectors, ~self._mask, self._grid, self.head)
        self._losses = self._weight() * losses
        return self._losses

    def _localized(self) -> Tensor | None:
        """Return one vector for each patch of the last forward: position rows or output tokens.

        Raises:
            Incompatible: There are others beside the patches and the known prefix tokens.
        """
        assert self._mask is not None
        patches = self._mask.shape[1]
        if self.settings.dal == "positions":
            rows, prefix = next(iter(self._rows), None), self.anatomy.position_prefix
            if rows is not None and rows.shape[-2] != prefix + patches:
                raise Incompatible(
                    f"Expected a row of the position embedding for each of {patches} patches, got "
                    f"{rows.shape[-2] - prefix}: the images have another size than it. Use "
                    "dal='tokens', or images of the model's size."
                )
            return rows if rows is None else rows[..., prefix:, :]
        tokens = self._outputs
        if tokens is None:
            return None
        if tokens.dim() == 4 and tokens.shape[-1] == self.anatomy.width:
            tokens = tokens.flatten(1, 2)  # rows and columns of tokens, as SAM keeps them
        # without positions the patches are placed before prefix tokens join them
        prefix = self.anatomy.prefix_tokens if self.anatomy.positions is None else self._prefix
        if tokens.dim() != 3 or tokens.shape[1] != prefix + patches:
            raise Incompatible(
                f"Expected {prefix} prefix tokens and {patches} patches from the last block for "
                f"dal='tokens', got {tuple(tokens.shape)}: which of them are patches is not "
                "known. Leave DAL out (dal='none'), or give an Anatomy with the right "
                "prefix_tokens."
            )
        return F.layer_norm(tokens[:, prefix:], tokens.shape[-1:])

    def remember(self, rows: Tensor) -> None:
        """Take the position embedding of this very forward (functional calls swap it)."""
        self._rows = (rows,)

    def leave(self, outputs: Tensor) -> None:
        """Take the last block's output, of the forward itself and not of a recomputation."""
        if self._outputs is None and self._losses is None and self._unread:
            self._outputs = outputs

    def _weight(self) -> float:
        s = self.settings
        return dal_weight(
            self._step(), weight=s.dal_weight, final=s.dal_final, warmup=s.warmup, steps=s.steps
        )

    # the forward

    def begin(self, tokens: Float[Tensor, "batch patches width"], grid: tuple[int, int]) -> None:
        """Draw for these tokens and remember them."""
        self._idle = self._idle and gradient_left(self)
        self.require_values()
        if torch._C._current_graph_task_id() != -1:
            raise Incompatible(
                "Expected activation checkpointing inside the model, got it around the patch "
                "embedding, where recomputing would shuffle anew. Checkpoint the blocks only."
            )
        self._require_read("the next")
        self._forget()
        self._grid = grid
        mask, source = self.draw(len(tokens), grid)
        self._mask = mask.to(tokens.device, non_blocking=True)
        self._source = source.to(tokens.device, non_blocking=True)
        # in one piece: another thread that begins meanwhile replaces all of it or nothing
        self._begun = (threading.get_ident(), tokens, self._mask, self._source)
        self.forwards += 1
        self._unread = self.settings.dal != "none" and torch.is_grad_enabled()

    def _require_read(self, before: str) -> None:
        if self._unread:
            self._unread = False  # said once, then the loop may go on
            raise Unprotected(
                "Expected guard.auxiliary_loss() to be read after each training forward, got "
                f"a forward whose loss was never read before {before}. Add it to the loss; with "
                "several forwards in a step, after each of them: loss = criterion(model(a), y) + "
                "guard.auxiliary_loss(), then the same for b."
            )

    def draw(self, batch: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return mask and source, who sits where, (batch, patches) each."""
        s = self.settings
        if self._pinned is not None:
            if self._pinned.shape != (batch, grid[0] * grid[1]):
                raise expected(
                    f"shuffled positions of shape ({batch}, {grid[0] * grid[1]})",
                    tuple(self._pinned.shape),
                )
            return self._pinned, torch.arange(grid[0] * grid[1]).expand(batch, -1)
        keys = self._keys
        if keys is None:
            one = s.draw == "batch"
            keys = self.draws.keys(1 if one else batch)
            keys = keys.expand(batch) if one else keys
        if len(keys) != batch:
            raise expected(f"one key for each of {batch} examples", len(keys))
        different, index = keys.unique(return_inverse=True) if s.draw == "batch" else (keys, None)
        patches = grid[0] * grid[1]
        count = math.floor(self._ratio() * patches + 1e-9)
        if count < 2:
            self._warn(patches)
        if s.mask == "uniform":
            mask = masks.uniform_masks(self.draws, different, patches, count)
        else:
            mask = masks.block_masks(self.draws, different, grid, count)
        if s.probability < 1:
            mask = mask & masks.chosen(self.draws, different, s.probability)
        source = masks.permute_inside(self.draws, different, mask, derangement=s.derangement)
        return (mask, source) if index is None else (mask[index], source[index])

    def _warn(self, patches: int) -> None:
        """Say once that this forward moves no patch."""
        if self._warned:
            return
        self._warned = True
        s, step = self.settings, self._step()
        if step < s.warmup:
            why = f"Step {step} is in the warm-up of {s.warmup} steps."
        elif self._ratio() < s.ratio:
            why = f"At step {step} of {s.steps} the {s.schedule} schedule has only begun."
        else:
            why = (
                f"Expected at least 2 of {patches} patches to shuffle; ratio={s.ratio} gives less."
            )
        warnings.warn(
            f"PatchShuffle moves no patch, and updates of such steps are not protected. {why}",
            stacklevel=2,
        )

    def _step(self) -> int:
        return int(self.get_buffer("step")) if "step" in self._buffers else 0

    def _ratio(self) -> float:
        """Return the ratio at this optimizer step."""
        s = self.settings
        if not s.warmup and s.schedule == "constant":
            return s.ratio
        step = self._step()
        if step < s.warmup:
            return 0.0
        if s.schedule == "constant":
            return s.ratio
        done = min(1.0, (step - s.warmup) / (s.steps - s.warmup))
        return s.ratio * (done if s.schedule == "linear" else (1 - math.cos(math.pi * done)) / 2)

    def require_placed(self) -> None:
        """Raise Unprotected if the patches of a whole forward went round the placing."""
        if self._begun is not None:
            raise Unprotected(
                f"Expected a training pass that takes its patches through {self.anatomy.embedded}, "
                f"got one that never reached {self.anatomy.embedded}: no patch was shuffled. "
                "Protect the model again after its parts or its forward were replaced."
            )

    def place(self, sequence: Float[Tensor, "batch tokens width"]) -> Tensor:
        """Return the embedded sequence with shuffled patches in the masked slots."""
        begun, self._begun = self._begun, None
        if begun is None:
            raise Unprotected(
                f"Expected {self.anatomy.patch_stage} to embed the patches of this forward, got a "
                "sequence that did not come from it."
            )
        thread, tokens, mask, source = begun
        if thread != threading.get_ident():
            raise Unprotected(
                "Expected one training pass of a model at a time, got the patches of another "
                "thread's: images would be mixed. Give each thread a copy of the model."
            )
        self._prefix = sequence.shape[1] - tokens.shape[1]
        if self._prefix < 0 or len(sequence) != len(tokens):
            raise Unprotected(
                f"Expected a sequence with all {tokens.shape[1]} patches of {len(tokens)} images, "
                f"got shape {tuple(sequence.shape)}."
            )
        moved = tokens.gather(1, source[..., None].expand_as(tokens)) + self.unknown
        kept = sequence[:, self._prefix :]
        patches = torch.where(mask[..., None], moved.to(sequence.dtype), kept)
        if self._prefix:
            patches = torch.cat([sequence[:, : self._prefix], patches], 1)
        mark(patches)
        return patches

    # optimizers, see defenses/steps.py

    def moving(self, model: nn.Module) -> None:
        self.intact(model)
        self._require_read("the optimizer's step")
        if unwatched_gradient(self, model):  # of a head that came later, and no pass went by
            self.expose()
        protection = Protection.of(model)
        if self._idle and (protection is None or not protection.rehearsal):
            raise Unprotected(
                "Expected a model in training mode, got an optimizer's step after a pass in eval "
                "mode, where patches are not shuffled, or after one of a part of the model on "
                "features that were not. Call model.train() before the pass (a model of "
                "from_pretrained comes in eval mode), call the model itself and freeze what is not "
                "to move, and put single layers into eval mode for what they do there; evaluate "
                "under torch.no_grad(), or call optimizer.zero_grad() after a gradient in eval "
                "mode."
            )

    def used(self) -> bool:
        return self.forwards > 0

    def stepped(self) -> None:
        self._left_out_at = None
        if self._stepped_at == self.forwards:
            return
        self._stepped_at = self.forwards
        if "step" in self._buffers:
            self.get_buffer("step").add_(1)

    def left_out(self, trained: set[int], needed: int) -> bool:
        """Note a step that trains only some of them, by id; True if another one left them out.

        Of one forward several optimizers may train a part each.
        """
        if self._stepped_at == self.forwards:
            return False
        if self._left_out_at is None:
            self._left_out_at, self._trained = self.forwards, set()
        self._trained |= trained
        if self._left_out_at == self.forwards and len(self._trained) == needed:
            self.stepped()
        return self._left_out_at is not None and self._left_out_at < self.forwards


def _start(model: nn.Module, anatomy: Anatomy) -> Tensor:
    """Return where the unknown embedding starts: the mean of the positions, which tells none."""
    like: Any = model.get_submodule(anatomy.patch).weight  # may be parametrised
    if anatomy.positions is None:
        return torch.zeros(1, anatomy.width, dtype=like.dtype, device=like.device)
    path, _, attribute = anatomy.positions.rpartition(".")
    positions = getattr(model.get_submodule(path), attribute).detach()
    return positions[:, anatomy.position_prefix :].mean(1).to(like)
