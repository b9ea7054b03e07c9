"""Record-level differential privacy (DP-SGD): clip each example's gradient, add Gaussian noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitguard.core import Batch, Loss, Traits
from vitguard.defenses.base import Defense, Draws
from vitguard.defenses.privacy.accounting import Ledger, noisy
from vitguard.defenses.privacy.checks import check_model
from vitguard.defenses.privacy.clipping import clipping_factors
from vitguard.defenses.privacy.engine import Clipped, clipped_sum
from vitguard.defenses.privacy.engines import engine_of
from vitguard.defenses.privacy.losses import auxiliary_losses, per_example_losses
from vitguard.defenses.privacy.mixing import refuse_mixing_defenses
from vitguard.defenses.privacy.prepare import prepare_training
from vitguard.defenses.privacy.probe import probe
from vitguard.defenses.privacy.target import PrivacyTarget
from vitguard.defenses.privacy.training import paused
from vitguard.errors import Unprotected
from vitguard.vit import Anatomy, canonical_name, logits_of

__all__ = ["DifferentialPrivacy"]


@dataclass(frozen=True)
class DifferentialPrivacy(PrivacyTarget):
    """DP-SGD on Opacus's optimizer, with every example's gradient clipped in one backward pass.

    Guarantees:
        The sum of clipped gradients moves by at most `clip` when one example joins or leaves.
        The noise on it has standard deviation `noise * clip` in every coordinate.
        `privacy_spent` is an upper bound on epsilon at `delta` for adding or removing one record,
        over every step and round that the ledger saw.

    Does not protect against:
        What many records have in common, and attacks at a large epsilon: read the audit's rate
        beside the bound. A training loss in which examples meet (a contrastive loss) voids the
        bound: wrap the criterion in `PerExample`, which refuses it. The loop itself tells mixup,
        and class weights with a mean after some batches. A record that the data set holds several
        times (copies, the same files under another transform) counts as several records. The
        computed sum has the bound to within its rounding (docs/randomness.md).

    Args:
        epsilon: Target; needs `epochs`. Without it `noise` is used as it is.
        delta: Chance that the bound fails; below one over the number of records.
        clip: Bound C on the 2-norm of one example's gradient over all parameters, above 0.
        noise: Noise multiplier: standard deviation over `clip`. 0 gives no privacy and an infinite
            epsilon. With neither `epsilon` nor `noise`, 1.0.
        epochs: Passes over the data that the target epsilon must last for, over all rounds. In
            `Guard.update`, where nothing is sampled, the number of updates. A step that would
            spend more than the target raises `Unprotected` and releases nothing.
        engine: `bookkeeping`, or `opacus` for Opacus's own per-sample gradients: slow, for
            reference.
        accountant: `prv` (tight) or `rdp`.
        physical_batch: Most examples in memory at once; larger batches come in pieces, and the
            step follows the last. The loader's length still counts steps, not pieces.
        clipping: `flat` shortens gradients longer than `clip`. `automatic` brings all to about
            `clip`: no clip to tune against the size of gradients. `per_layer` clips each of L
            layers by itself, to `clip / sqrt(L)`. The bound, and so the account, is the same.

    Raises:
        InputError: A value out of range, or both `epsilon` and `noise`.

    References:
        Abadi et al., arXiv:1607.00133; Opacus, arXiv:2109.12298; accountant, arXiv:2106.02848.

    Examples:
        >>> DifferentialPrivacy(noise=1.1).spec()
        'privacy:noise=1.1'
    """

    name: ClassVar[str] = "privacy"
    promise: ClassVar[str] = (
        "its epsilon bounds what anyone learns of an image, over all steps that it counts; "
        "it costs accuracy"
    )

    def check(self, model: nn.Module, anatomy: Anatomy, stack: Sequence[Defense]) -> None:
        """Raise Incompatible if no gradient of one example alone can be told for the model."""
        check_model(model)
        refuse_mixing_defenses(stack, anatomy)

    def traits(self, before: Traits, anatomy: Anatomy) -> Traits:
        """Return what noise leaves, and whether layers have factors of their own."""
        found = noisy(before, self._release_noise())
        if self.clipping != "per_layer":
            return found
        return replace(found, exact=False, layerwise=True)

    def clipped_sum(self, model: nn.Module, loss: Loss, batch: Batch) -> dict[str, Tensor]:
        """Return the sum of the batch's clipped gradients, without noise, by base parameter name.

        The model's defenses act as they do in training; an auxiliary loss that depends on the
        examples is part of each example's loss, before clipping.

        Raises:
            Incompatible: The model mixes examples, shares parameters, or cannot be followed.
            Unprotected: A loss reached a parameter around the clipping.
        """
        return self.clipped(model, loss, batch).sums

    def clipped(
        self, model: nn.Module, loss: Loss, batch: Batch, *, probed: bool = True
    ) -> Clipped:
        """Return what `clipped_sum` does, with each example's norm before clipping.

        Args:
            probed: Whether it is asked first if examples meet.
        """
        check_model(model)
        clipped = self._clip(model, loss, batch, probed=probed)
        trainable = {k: p for k, p in model.named_parameters() if p.requires_grad}
        sums = {
            canonical_name(k): clipped.sums.get(k, torch.zeros_like(p))
            for k, p in trainable.items()
        }
        return Clipped(sums, clipped.norms)

    def _clip(self, model: nn.Module, loss: Loss, batch: Batch, *, probed: bool) -> Clipped:
        """Run one recorded pass over a batch and clip; `probed` asks first if examples meet."""
        engine = engine_of(self.engine)
        held = {p: p.grad for p in model.parameters() if p.grad is not None}
        for p in held:
            p.grad = None
        try:
            if probed:
                probe(model, engine, (batch.images,))
            with torch.enable_grad(), paused(model), engine.watch(model, batch.images) as tape:
                outputs = model(batch.images)
            with torch.enable_grad(), paused(model):
                auxiliary = auxiliary_losses(model, len(batch.labels))
                engine.verify(model, tape, (outputs, auxiliary))
                losses = per_example_losses(loss, logits_of(outputs), batch.labels)
                torch.autograd.backward(sum(auxiliary, start=losses).sum())
            if leaked := tape.leak():
                raise Unprotected(
                    f"Expected every gradient to come through clipping, got one of {leaked} "
                    "around it."
                )
            return clipped_sum(tape, self.clip, clipping=self.clipping)
        finally:
            engine.close()
            for p in model.parameters():
                p.grad = held.get(p)

    def gradient(
        self, model: nn.Module, loss: Loss, batch: Batch, draws: Draws
    ) -> Mapping[str, Tensor]:
        """Return (clipped sum + noise) / batch size, by base parameter name."""
        noise, size = self._release_noise(), len(batch.labels)
        # in a rehearsal nothing is promised beyond this batch, and one example meets no other
        alone = draws.seeded is not None and size == 1
        sums = self.clipped(model, loss, batch, probed=not alone).sums
        return {k: s / size for k, s in draws.noised_all(sums, noise * self.clip).items()}

    def mimic(self, examples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Clip each example's gradient as the engine does; the noise has mean zero."""
        clipped = []
        for gradient in examples:
            norms = {k: g.norm() for k, g in gradient.items()}
            factors = clipping_factors(norms, self.clip, self.clipping, gradient)
            clipped.append({k: g * factors[k] for k, g in gradient.items()})
        return super().mimic(clipped)

    def prepare(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loader: Any,
        draws: Draws,
        ledger: Ledger | None = None,
    ) -> tuple[Any, Any, Ledger]:
        """Return the private optimizer, the Poisson loader and the ledger that counts the steps.

        `model` keeps its structure and state-dict keys. A ledger from earlier rounds goes on.

        Raises:
            Incompatible: The model or loader cannot be private.
            InputError: delta is not below one over the number of records, or epochs are missing.
            MissingExtra: opacus is not installed.
        """
        ledger = self.ledger() if ledger is None else ledger
        private, poisson = prepare_training(self, model, optimizer, loader, draws, ledger)
        return private, poisson, ledger
