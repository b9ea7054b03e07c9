"""A criterion that divides by what a batch holds lets one record change what all others add."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import vitguard as vg
from tests.fast import crossed
from vitguard.defenses.privacy import PerExample
from vitguard.defenses.privacy.divisor import CommonDivisor
from vitguard.errors import Unprotected

pytest.importorskip("opacus")
WEIGHTS = torch.tensor([0.2, 3.0, 1.0, 0.7])
DATA = TensorDataset(
    torch.randn(48, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(48) % 4
)


def focal(scores, labels):
    return ((1 - F.cross_entropy(scores, labels, reduction="none").neg().exp()) ** 2).mean()


DIVIDED = {
    "class weights": nn.CrossEntropyLoss(weight=WEIGHTS),
    "class weights as log-likelihoods": lambda s, y: F.nll_loss(s.log_softmax(1), y, WEIGHTS),
    "an ignored class": nn.CrossEntropyLoss(ignore_index=2),
    "a scaled mean": lambda s, y: 0.3 * F.cross_entropy(s, y, weight=WEIGHTS),
    "the hardest three": lambda s, y: (
        F.cross_entropy(s, y, reduction="none").topk(min(3, len(y))).values.mean()
    ),
    "by the batch's own weights": lambda s, y: (
        (w := WEIGHTS[y]) * F.cross_entropy(s, y, reduction="none")
    ).sum() / w.sum(),
}  # fmt: skip
ALONE = {
    "no weights": F.cross_entropy,
    "smoothed labels": nn.CrossEntropyLoss(label_smoothing=0.1),
    "class weights in a mean": lambda s, y: (
        F.cross_entropy(s, y, weight=WEIGHTS, reduction="none").mean()
    ),
    "class weights of each example": PerExample(nn.CrossEntropyLoss(weight=WEIGHTS)),
    "an ignored class of each example": PerExample(nn.CrossEntropyLoss(ignore_index=2)),
    "two weights": lambda s, y: (
        (0.5 + (y > 1).to(s)) * F.cross_entropy(s, y, reduction="none")
    ).mean(),
    "a focal loss": focal,
}  # fmt: skip


def binary(scores, labels, reduction="mean"):
    return F.binary_cross_entropy_with_logits(
        scores, F.one_hot(labels, 4).to(scores), reduction=reduction
    )


ALONE["binary cross-entropy"] = binary
ADDED = {
    "a binary sum": lambda s, y: binary(s, y, "sum"),
    "a sum": nn.CrossEntropyLoss(reduction="sum"),
    "a sum over a constant": lambda s, y: F.cross_entropy(s, y, reduction="sum") / 8,
    "a mean times the size": lambda s, y: len(y) * F.cross_entropy(s, y, label_smoothing=0.0),
    "class weights in a sum": nn.CrossEntropyLoss(weight=WEIGHTS, reduction="sum"),
}


def seen(criterion, batches, classes=4, scale=1.0, dtype=torch.float32):
    """Show a watcher so many batches of drawn scores; return how many it took to refuse."""
    generator, watcher = torch.Generator().manual_seed(batches), CommonDivisor()
    for i in range(batches):
        size = int(torch.randint(2, 9, (), generator=generator))
        scores = scale * torch.randn(size, classes, generator=generator)
        scores = scores.to(dtype).requires_grad_()
        labels = torch.randint(classes, (size,), generator=generator)
        (gradient,) = torch.autograd.grad(criterion(scores.float(), labels), scores)
        try:
            watcher.refuse(scores.detach(), gradient)
        except Unprotected:
            return i + 1
    return None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", DIVIDED)
def test_a_common_divisor_is_told_within_a_few_batches(kind, dtype):
    for batches in range(50, 60):
        assert seen(DIVIDED[kind], batches, dtype=dtype) in range(3, 30)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype"), crossed(ALONE, [torch.float32, torch.bfloat16]))
def test_terms_of_one_example_each_pass(kind, dtype):
    for scale in (0.01, 1.0, 5.0):
        assert seen(ALONE[kind], 300, scale=scale, dtype=dtype) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ADDED)
def test_a_sum_is_told_within_a_few_batches(kind, dtype):
    for batches in range(50, 60):
        assert seen(ADDED[kind], batches, dtype=dtype) in range(3, 12)


def test_batches_of_almost_one_size_are_not_taken_for_a_sum():
    watcher, scores = CommonDivisor(), torch.randn(5003, 4, requires_grad=True)
    for size in (5000, 5001, 5002, 5003) * 2:
        rows = scores[:size]
        loss = F.cross_entropy(rows, torch.arange(size) % 4)
        watcher.refuse(rows.detach(), *torch.autograd.grad(loss, rows))


@pytest.mark.slow
def test_weights_of_single_examples_that_add_up_to_one_by_chance_pass():
    def halves(scores, labels):
        generator = torch.Generator().manual_seed(int(1e6 * scores.sum().abs()) % 2**31)
        drawn = torch.randint(2, labels.shape, generator=generator).to(scores)
        return ((0.5 + drawn) * F.cross_entropy(scores, labels, reduction="none")).mean()

    assert [seen(halves, n) for n in range(300, 310)] == [None] * 10


def trained(model, criterion, passes=6):
    guard = vg.protect(model, "privacy:noise=1,clip=1,delta=0.01,accountant=rdp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer, loader = guard.prepare(optimizer, DataLoader(DATA, 12))
    for _ in range(passes):
        for images, labels in loader:
            criterion(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.slow
def test_a_private_loop_with_class_weights_is_stopped_and_with_those_of_each_example_it_goes_on(
    small_vit,
):
    with pytest.raises(Unprotected, match=r"divides by what the batch holds.*PerExample"):
        trained(small_vit(depth=1, num_classes=4), nn.CrossEntropyLoss(weight=WEIGHTS))
    trained(small_vit(depth=1, num_classes=4), PerExample(nn.CrossEntropyLoss(weight=WEIGHTS)))


def test_a_private_loop_with_a_sum_is_stopped_as_each_example_counts_more_in_a_larger_batch(
    small_vit,
):
    with pytest.raises(Unprotected, match=r"mean over the batch.*reduction=.sum"):
        trained(small_vit(depth=1, num_classes=4), nn.CrossEntropyLoss(reduction="sum"))


@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(weight=WEIGHTS),
        nn.CrossEntropyLoss(weight=WEIGHTS, ignore_index=1),
        nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.2),
    ],
)
def test_the_weights_of_a_criterion_are_kept_example_by_example(criterion):
    scores, labels = torch.randn(6, 4), torch.tensor([0, 1, 1, 2, 3, 0])
    each = F.cross_entropy(
        scores, labels, weight=WEIGHTS, reduction="none", ignore_index=criterion.ignore_index,
        label_smoothing=criterion.label_smoothing,
    )  # fmt: skip
    assert torch.allclose(PerExample(criterion)(scores, labels), each.mean())
    assert len(set(each.div(F.cross_entropy(scores, labels, reduction="none")).tolist())) > 2


def test_a_criterion_that_is_no_mean_of_single_terms_is_refused_and_not_changed(small_vit):
    scores, labels = torch.randn(6, 4), torch.tensor([0, 1, 1, 2, 3, 0])
    hidden = lambda s, y: F.cross_entropy(s, y, weight=WEIGHTS)  # noqa: E731
    centred = lambda s, y: F.cross_entropy(s - s.mean(0), y)  # noqa: E731
    for criterion in (hidden, centred, nn.NLLLoss(weight=WEIGHTS)):
        with pytest.raises(Unprotected, match=r"one example each.*reduction=.none"):
            PerExample(criterion)(scores, labels)
    guard = vg.protect(
        small_vit(depth=1, num_classes=4).train(), "privacy:noise=1,clip=1,delta=0.01"
    )
    with pytest.raises(Unprotected, match="one example each"):
        guard.update(DATA[:6][0], labels, loss=hidden)
    for criterion in (nn.CrossEntropyLoss(weight=WEIGHTS), lambda s, y: F.cross_entropy(s, y)):
        guard.update(DATA[:6][0], labels, loss=criterion)


def test_a_criterion_that_says_each_example_by_itself_is_taken():
    scores, labels = torch.randn(6, 4), torch.tensor([0, 1, 1, 2, 3, 0])
    each = lambda s, y: F.cross_entropy(s, y, reduction="none")  # noqa: E731
    assert torch.allclose(PerExample(each)(scores, labels), F.cross_entropy(scores, labels))


def test_a_criterion_that_draws_is_not_taken_for_one_in_which_examples_meet():
    scores, labels = torch.randn(6, 4), torch.tensor([0, 1, 1, 2, 3, 0])
    state = torch.get_rng_state()
    dropped = lambda s, y: F.cross_entropy(F.dropout(s, 0.5), y)  # noqa: E731
    PerExample(dropped)(scores, labels)
    torch.set_rng_state(state)
    one = PerExample(dropped)(scores, labels)
    torch.set_rng_state(state)
    assert (
        torch.stack([dropped(scores[i : i + 1], labels[i : i + 1]) for i in range(6)]).mean() == one
    )
