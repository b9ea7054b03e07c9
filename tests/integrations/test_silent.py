"""Ways to train unprotected or uncounted in silence, where a trainer is used without the mixins."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import vitguard as vg
from tests.conftest import small_vit
from vitguard.errors import Unprotected

pytest.importorskip("opacus")
PRIVATE = "privacy:noise=0.5,clip=1,delta=0.01,accountant=rdp"


def transformers_with_a_stock_optimizer(folder):
    one = pytest.importorskip("tests.integrations.test_transformers")

    class ByHand(one.Trainer):
        def get_train_dataloader(self):
            plain = torch.optim.SGD(self.model.parameters(), lr=0.1)
            data = DataLoader(one.Photos(), 4, shuffle=True, collate_fn=one.collate_fn)
            return vg.Guard.of(self.model).prepare(plain, data)[1]  # and the optimizer is lost

    model, guard = one.guarded(PRIVATE)
    return model, guard, lambda: one.trainer(model, folder, ByHand).train()


def lightning_module(one, lost):
    class Own(one.Lit):
        def configure_optimizers(self):
            plain = torch.optim.SGD(self.parameters(), lr=0.1)
            data = DataLoader(one.DATA, 4)
            private, self.loader = vg.Guard.of(self.net).prepare(plain, data)
            return torch.optim.SGD(self.parameters(), lr=0.1) if lost else private

        def train_dataloader(self):
            return self.loader

    return Own(PRIVATE)


def lightning_with_a_stock_optimizer(folder):
    one = pytest.importorskip("tests.integrations.test_lightning")
    module = lightning_module(one, lost=True)
    return module.net, vg.Guard.of(module.net), lambda: one.fit(module)


def accelerate_with_a_stock_optimizer(folder):
    one = pytest.importorskip("tests.integrations.test_accelerate")
    accelerator = one.accelerate.Accelerator(cpu=True)
    model, guard = one.guarded(small_vit, PRIVATE)

    def train():
        _, loader = guard.prepare(one.sgd(model), DataLoader(one.DATA, 4))
        prepared, optimizer = accelerator.prepare(model, one.sgd(model))
        one.train(accelerator, prepared, optimizer, loader, guard)

    return model, guard, train


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make",
    [
        transformers_with_a_stock_optimizer, lightning_with_a_stock_optimizer,
        accelerate_with_a_stock_optimizer,
    ],
)  # fmt: skip
def test_a_stock_optimizer_on_the_private_loader_raises_before_a_weight_moves(make, tmp_path):
    model, guard, train = make(tmp_path)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(Unprotected, match="optimizer"):
        train()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not guard._ledgers["privacy"].history


def steps_of_lightning(folder):
    one = pytest.importorskip("tests.integrations.test_lightning")
    first, second = (lightning_module(one, lost=False) for _ in range(2))
    one.fit(first, epochs=2).save_checkpoint(folder / "half.ckpt")
    one.fit(second, epochs=4, ckpt_path=folder / "half.ckpt")
    return vg.Guard.of(second.net)


def steps_of_accelerate(folder):
    one = pytest.importorskip("tests.integrations.test_accelerate")

    def run(load=None):
        accelerator = one.accelerate.Accelerator(cpu=True)
        model, guard = one.guarded(small_vit, PRIVATE)
        optimizer, loader = guard.prepare(one.sgd(model), DataLoader(one.DATA, 4))
        model, optimizer = accelerator.prepare(model, optimizer)
        if load:
            accelerator.load_state(load)
        one.train(accelerator, model, optimizer, loader, guard)
        accelerator.save_state(folder / "half")
        return guard

    run()
    return run(folder / "half")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("resumed", [steps_of_lightning, steps_of_accelerate])
def test_the_optimizers_state_counts_what_was_spent_where_nothing_else_keeps_it(resumed, tmp_path):
    assert resumed(tmp_path)._ledgers["privacy"].history == [(0.5, 0.25, 16)]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_model_that_accelerate_prepared_is_protected_or_the_bare_one_is_asked_for(precision):
    """In one process accelerate wraps no model; it changes its forward."""
    one = pytest.importorskip("tests.integrations.test_accelerate")
    accelerator = one.accelerate.Accelerator(cpu=True, mixed_precision=precision)
    model = accelerator.prepare(small_vit(depth=1))
    guard = vg.protect(model, "shuffle:ratio=0.5,mask=uniform")
    optimizer = guard.prepare(one.sgd(model))
    images, labels = one.DATA.tensors
    accelerator.backward(F.cross_entropy(model.train()(images), labels))
    optimizer.step()
    assert guard.truth()["shuffled"].sum() == 16 * 8
