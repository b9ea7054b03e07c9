"""Clipping cannot be walked around: one batch, one step, and nothing left over from another."""

import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.defenses.privacy.privacy_models import build
from vitguard.defenses.privacy import DifferentialPrivacy
from vitguard.errors import Incompatible, Unprotected
from vitguard.guard import protect

pytest.importorskip("opacus")


def prepared(*, batch=6, count=24, lr=1.0, engine="bookkeeping", kind=torch.optim.SGD, **settings):
    settings = {"noise": 0.0, "delta": 1e-3, "clip": 1.0} | settings
    torch.manual_seed(5)
    images = torch.randn(count, 3, 32, 32, dtype=torch.float64)
    data = TensorDataset(images, torch.randint(0, 10, (count,)))
    model = build("vit")
    generator = torch.Generator().manual_seed(6)  # fresh draws are empty once in a thousand times
    guard = protect(model, [DifferentialPrivacy(engine=engine, **settings)], generator=generator)
    optimizer, loader = guard.prepare(
        kind(model.parameters(), lr=lr), DataLoader(data, batch_size=batch)
    )
    return model, guard, optimizer, loader


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def learn(model, batch):
    loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    return loss


def clipped_by_hand(guard, batch, clip=1.0):
    """Return the sum of clipped gradients, in the order of the parameters."""
    (defense,) = guard.defenses
    from vitguard.core import Batch

    sums = defense.clipped_sum(guard.model, F.cross_entropy, Batch(*batch))
    return torch.cat([s.flatten() for s in sums.values()])


# one batch, one step


@pytest.mark.slow
def test_pieces_left_by_a_loop_that_broke_off_never_join_the_next_step():
    model, guard, optimizer, loader = prepared(batch=24, physical_batch=4)
    for i, batch in enumerate(loader):
        learn(model, batch)
        optimizer.step()
        optimizer.zero_grad()
        if i == 3:
            break  # four pieces of six were clipped and added up
    for images, labels in loader:
        learn(model, (images[:4], labels[:4])) if len(images) == 4 else None
        break
    loader.skip()
    before = weights(model)
    wanted = 0
    for batch in loader:
        wanted = wanted + clipped_by_hand(guard, batch)
        learn(model, batch)
        optimizer.step()
        optimizer.zero_grad()
        if loader.ends_step:
            break
    moved = (before - weights(model)) * loader.expected_batch_size
    assert torch.allclose(moved, wanted, atol=1e-9)
    assert guard.privacy_spent().steps == 1


def ahead(loader):
    """Hand out each batch when the next one is there, as tools do that move batches early."""
    batches = iter(loader)
    current = next(batches)
    for following in batches:
        yield current
        current = following
    yield current


def test_looking_one_batch_ahead_is_refused_at_the_first_batch():
    model, _, _, loader = prepared()
    before = weights(model)
    with pytest.raises(Unprotected, match=r"after every batch.*physical_batch.*loader\.skip"):
        next(ahead(loader))
    assert torch.equal(before, weights(model))


def test_looking_ahead_over_the_pieces_of_a_batch_is_refused():
    _, _, _, loader = prepared(batch=24, physical_batch=4)
    with pytest.raises(Unprotected, match="after every batch"):
        next(ahead(loader))


def test_accelerate_leaves_the_private_loader_alone():
    accelerate = pytest.importorskip("accelerate")
    model, guard, optimizer, loader = prepared()
    assert accelerate.Accelerator(cpu=True).prepare(loader) is loader
    for batch in loader:
        learn(model, batch)
        optimizer.step()
        optimizer.zero_grad()
    assert guard.privacy_spent().steps == 4


@pytest.mark.parametrize("physical", [None, 4])
def test_accumulation_over_batches_is_refused_at_the_second(physical):
    model, guard, _, loader = prepared(batch=12, physical_batch=physical)
    before = weights(model)
    with pytest.raises(Unprotected, match="in place of accumulation"):
        for batch in loader:
            learn(model, batch)
    assert torch.equal(before, weights(model)) and guard.privacy_spent().steps == 0


def test_a_batch_left_out_without_saying_so_is_refused():
    _, _, _, loader = prepared()
    with pytest.raises(Unprotected, match=r"loader\.skip"):
        for i, _batch in enumerate(loader):
            if i == 0:
                continue
    batches = iter(loader)
    for _ in range(3):
        next(batches)
        loader.skip()
    next(batches)
    with pytest.raises(Unprotected, match=r"loader\.skip"):
        next(batches)  # the last one was not stepped on either


@pytest.mark.parametrize("when", ["taken", "seen by the model", "between pieces"])
def test_a_skipped_batch_is_neither_released_nor_counted(when):
    model, guard, optimizer, loader = prepared(batch=12, physical_batch=3)
    before, numbers = weights(model), []
    for batch in loader:
        due = model.vitguard.privacy.due
        numbers.append((due.batch, due.piece))
        if when == "seen by the model":
            learn(model, batch)
        if when == "between pieces" and not due.last:
            learn(model, batch)
            optimizer.step()
        loader.skip()
        optimizer.zero_grad()
    assert [piece for _, piece in numbers] == [0, 0]  # the other pieces went with the first
    assert torch.equal(before, weights(model)) and guard.privacy_spent().steps == 0


def test_two_iterators_over_one_loader_are_refused():
    model, _, optimizer, loader = prepared()
    with pytest.raises(Unprotected, match="one iterator"):
        next(zip(loader, loader, strict=True))
    older = iter(loader)
    learn(model, next(older))
    newer = iter(loader)
    learn(model, next(newer))
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(Unprotected, match="one iterator"):
        next(older)


@pytest.mark.parametrize("left", ["taken", "forward", "backward"])
def test_a_new_iterator_after_a_break_starts_clean(left):
    model, guard, optimizer, loader = prepared()
    for images, labels in loader:
        if left != "taken":
            loss = F.cross_entropy(model(images), labels)
        if left == "backward":
            loss.backward()
        break
    before = weights(model)
    batch = next(iter(loader))
    wanted = clipped_by_hand(guard, batch)
    learn(model, batch)
    optimizer.step()
    moved = (before - weights(model)) * loader.expected_batch_size
    assert torch.allclose(moved, wanted, atol=1e-9)
    assert guard.privacy_spent().steps == 1


def test_an_earlier_batch_in_place_of_the_one_due_is_refused():
    model, _, _, loader = prepared(batch=24)  # every record joins: all batches have one size
    kept = next(iter(loader))
    next(iter(loader))
    with pytest.raises(Unprotected, match="an earlier batch"):
        model(kept[0])


def test_a_loader_of_an_earlier_prepare_or_of_a_removed_guard_is_refused():
    model, guard, optimizer, loader = prepared()
    optimizer, again = guard.prepare(optimizer, loader.source)
    with pytest.raises(Unprotected, match="prepared again"):
        next(iter(loader))
    learn(model, next(iter(again)))
    optimizer.step()
    guard.remove()
    with pytest.raises(Unprotected, match="removed"):
        next(iter(again))


# backward passes and steps


def test_an_optimizer_of_an_earlier_prepare_or_of_a_removed_guard_is_refused():
    model, guard, first, _ = prepared()
    body = [p for n, p in model.named_parameters() if not n.startswith("head")]
    given = DataLoader(TensorDataset(torch.randn(24, 3, 32, 32).double(), torch.arange(24) % 10), 6)
    second, loader = guard.prepare(torch.optim.SGD(body, lr=1.0), given)
    learn(model, next(iter(loader)))
    before = weights(model)
    with pytest.raises(Unprotected, match=r"Put all that is trained into one optimizer, in groups"):
        first.step()
    assert torch.equal(weights(model), before)
    second.step()
    guard.remove()
    with pytest.raises(Unprotected, match="prepared again or removed"):
        second.step()


@pytest.mark.parametrize("engine", ["bookkeeping", "opacus"])
def test_two_backward_passes_before_one_step_are_both_in_it_or_raise(engine):
    model, guard, optimizer, loader = prepared(clip=1e3, engine=engine)
    images, labels = next(iter(loader))
    before = weights(model)
    outputs = model(images)
    first = F.cross_entropy(outputs, labels)
    second = 0.5 * outputs.square().mean(1).mean()
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert parameters
    first.backward(retain_graph=True)
    if engine == "opacus":
        with pytest.raises((Unprotected, Incompatible)):
            second.backward()
            optimizer.step()
        assert torch.equal(before, weights(model)) and guard.privacy_spent().steps == 0
        return
    second.backward()
    optimizer.step()
    moved = before - weights(model)
    guard.remove()
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(before, model.parameters())
    outputs = model(images)
    both = F.cross_entropy(outputs, labels) + 0.5 * outputs.square().mean(1).mean()
    plain = torch.cat([g.flatten() for g in torch.autograd.grad(both, list(model.parameters()))])
    wanted = plain * len(images) / loader.expected_batch_size
    assert torch.allclose(moved, wanted, atol=1e-9)


def test_a_backward_pass_after_the_step_of_its_batch_raises():
    model, _, optimizer, loader = prepared()
    images, labels = next(iter(loader))
    loss = F.cross_entropy(model(images), labels)
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(Unprotected, match="would be lost"):
        loss.backward()


@pytest.mark.parametrize("how", ["skip", "new iterator"])
def test_a_backward_pass_of_a_batch_that_was_left_raises(how):
    model, _, _, loader = prepared()
    images, labels = next(iter(loader))
    loss = F.cross_entropy(model(images), labels)
    if how == "skip":
        loader.skip()
    else:
        images, labels = next(iter(loader))
        loss = loss + F.cross_entropy(model(images), labels)
    with pytest.raises(Unprotected, match="would be lost"):
        loss.backward()


def test_a_step_without_a_backward_pass_raises():
    model, guard, optimizer, loader = prepared()
    images, _ = next(iter(loader))
    model(images)
    with pytest.raises(Unprotected, match=r"loss\.backward\(\).*got none"):
        optimizer.step()
    assert guard.privacy_spent().steps == 0


def test_a_piece_without_the_one_before_it_raises():
    model, guard, optimizer, loader = prepared(batch=24, physical_batch=8)
    batches = iter(loader)
    images, _ = next(batches)
    model(images)
    with pytest.raises(Unprotected, match="got none"):
        optimizer.step()  # without a backward pass; the first piece is gone
    learn(model, next(batches))
    with pytest.raises(Unprotected, match="piece 2 without those before it"):
        optimizer.step()
    assert guard.privacy_spent().steps == 0


def test_a_second_step_on_a_batch_raises():
    model, guard, optimizer, loader = prepared()
    learn(model, next(iter(loader)))
    optimizer.step()
    after = weights(model)
    with pytest.raises(Unprotected, match="one training pass"):
        optimizer.step()
    assert torch.equal(after, weights(model)) and guard.privacy_spent().steps == 1


def test_a_pass_that_broke_off_can_be_run_again():
    model, guard, optimizer, loader = prepared()
    batch = next(iter(loader))
    failing = iter([True])

    def fail_once(*_):
        if next(failing, False):
            raise MemoryError

    with torch.no_grad():
        model.blocks[1].register_forward_hook(fail_once)
    with pytest.raises(MemoryError):
        model(batch[0])
    learn(model, batch)
    optimizer.step()
    assert guard.privacy_spent().steps == 1


# optimizers with a closure, and tools that cut batches themselves


def test_a_closure_runs_once_and_its_loss_comes_back():
    model, guard, optimizer, loader = prepared()
    for batch in loader:
        calls = itertools.count()

        def closure(batch=batch, calls=calls):
            next(calls)
            optimizer.zero_grad()
            return learn(model, batch)

        value = optimizer.step(closure)
        assert value.item() > 0 and next(calls) == 1
        optimizer.zero_grad()
    assert guard.privacy_spent().steps == 4


def test_an_optimizer_that_needs_several_passes_is_refused_before_training():
    with pytest.raises(Incompatible, match=r"got LBFGS.*SGD"):
        prepared(kind=torch.optim.LBFGS)


def test_opacus_memory_manager_is_refused_with_the_remedy():
    from opacus.utils.batch_memory_manager import BatchMemoryManager

    model, _, optimizer, loader = prepared()
    manager = BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer)
    with pytest.raises(AttributeError, match="physical_batch"):
        manager.__enter__()
    learn(model, next(iter(loader)))
    with pytest.raises(Incompatible, match="physical_batch"):
        optimizer.signal_skip_step()


@pytest.mark.parametrize("make", [
    lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.5),
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
])  # fmt: skip
def test_a_learning_rate_schedule_works_as_usual(make):
    model, guard, optimizer, loader = prepared(lr=0.1)
    scheduler = make(optimizer.original_optimizer)
    rates = set()
    for batch in loader:
        learn(model, batch)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        rates.add(optimizer.param_groups[0]["lr"])
    assert guard.privacy_spent().steps == 4 and rates != {0.1}
