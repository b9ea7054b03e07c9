"""Criteria that divide by what the batch holds, choose from it, or do not divide by its size.

Class weights or `ignore_index` with a mean do, and the hardest examples of a batch; a sum does not.

Cross-entropy gives example i the gradient c_i (softmax(scores_i) - label_i). A mean of terms of one
example each has c_i = w_i / B, which the other examples do not touch. Such a criterion divides by
the weights of the batch instead: the c_i of every batch add up to the same number, while one class
counts more in one batch than in another. A sum has the same c_i in a batch of any size: what is
taken for a mean of it grows with the batch, so that a record that joins makes all others larger.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitguard.errors import Unprotected

__all__ = ["CommonDivisor"]

_BATCHES = 12  # in a row: two weights of single examples add up to the same in one of four
_FINE, _COARSE = (1e-4, 1e-3), (2e-2, 0.1)
"""Relative distances up to which numbers are the same, and from which they are others: of float32
and float64, and of half precision."""
_SIZES = 3  # of batches in which an example counts the same: weights may do so in two by chance
_SURE = 1e-5  # chance of all other classes below which a weight cannot be read


class CommonDivisor:
    """Looks at the gradients of class scores over the batches of one training.

    Only cross-entropy against single labels is told, of binary cross-entropy a sum, in half
    precision only where weights differ by a tenth. A model that is sure of an example hides the
    weight of its batch.
    """

    def __init__(self) -> None:
        self.alike: list[tuple[float, int, dict[int, float]]] = []
        """Of the last batches: sum of the weights, size, and the weight of each class."""
        self.sums: dict[int, dict[int, float]] = {}
        """The weight of each class (-1: of all) in batches of each size, while they are equal."""

    def refuse(self, scores: Tensor, gradient: Tensor) -> None:
        """Take in a batch; raise Unprotected where `_BATCHES` of them have a common divisor.

        Also where batches of `_SIZES` sizes are not divided by their size.

        Args:
            scores: Shape (batch, classes).
            gradient: Of the loss, as large.
        """
        if scores.dim() != 2 or scores.shape[1] < 2:
            return
        fine = gradient.dtype in (torch.float32, torch.float64)
        same, other = _FINE if fine else _COARSE
        scores, whole = scores.detach().double(), gradient.detach().double()
        label = whole.argmin(1, keepdim=True)
        chances, gradient = scores.softmax(1).scatter(1, label, 0), whole.scatter(1, label, 0)
        taken, left = gradient.any(1), chances.sum(1)
        if not bool(taken.any()) or bool((left[taken] < _SURE).any()):
            return
        weights = gradient.sum(1) / left
        off = (gradient - weights[:, None] * chances).abs().amax(1)
        if bool((off > same * weights.abs()).any()):  # another criterion
            self._refuse_binary_sum(scores.sigmoid(), whole, same)
            return self.alike.clear()
        total, equal = float(weights.sum()), bool(_near(weights, weights.mean(), other).all())
        by_class = dict(zip(label[taken, 0].tolist(), weights[taken].tolist(), strict=True))
        self._refuse_sum(len(weights), {-1: total / len(weights)} if equal else by_class, same)
        if equal:
            return
        if self.alike and abs(self.alike[-1][0] / total - 1) > same:
            self.alike.clear()
        self.alike.append((total, len(weights), by_class))
        if len(self.alike) >= _BATCHES and self._moves(other):
            raise Unprotected(
                "Expected a criterion that is a mean of terms of one example each, got one that "
                "divides by what the batch holds (class weights or ignore_index with a mean, the "
                "hardest examples): a record changes what others add. Wrap class weights in "
                "PerExample, which keeps them, and train anew: no bound holds for the steps so far."
            )

    def _refuse_sum(self, size: int, weights: dict[int, float], same: float) -> None:
        """Raise Unprotected where an example counts as much in a large batch as in a small one."""
        sizes = [*self.sums, size]
        if max(sizes) < (1 + 20 * same) * min(sizes):  # a mean would give as good as the same
            sizes = []
        for before in self.sums.values():
            if any(abs(weights[k] / before[k] - 1) > same for k in weights.keys() & before.keys()):
                self.sums.clear()
                break
        if not self.sums or any(weights.keys() & before.keys() for before in self.sums.values()):
            self.sums[size] = weights
        if len(self.sums) >= _SIZES and sizes:
            raise Unprotected(
                "Expected a criterion that is a mean over the batch, got one that does not divide "
                'by its size (reduction="sum", the hardest few): a record that joins a batch makes '
                "the others in it count more. Take the mean, times a constant where the sum was "
                "meant, and train anew: no bound holds for the steps so far."
            )

    def _refuse_binary_sum(self, chances: Tensor, gradient: Tensor, same: float) -> None:
        """As `_refuse_sum` for binary cross-entropy, whose gradients are c (chances - labels)."""
        away = torch.where(gradient < 0, 1 - chances, chances)
        weights = gradient.abs() / away
        if bool((away < _SURE).any()) or not bool(_near(weights, weights.mean(), same).all()):
            return self.sums.clear()
        self._refuse_sum(len(weights), {-1: float(weights.mean())}, same)

    def _moves(self, other: float) -> bool:
        """Whether a class counts otherwise in one batch than in another."""
        (_, size, first), *others = self.alike
        return any(
            abs(weights[k] * count / (first[k] * size) - 1) > other
            for _, count, weights in others
            for k in weights.keys() & first.keys()
        )


def _near(values: Tensor, to: Tensor, relative: float) -> Tensor:
    return (values - to).abs() <= relative * to.abs()
