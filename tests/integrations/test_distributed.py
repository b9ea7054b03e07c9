"""Two processes: equal weights and one ledger, whatever the trainer; without privacy as one."""

import os
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import vitguard as vg
from tests.conftest import small_vit
from tests.defenses.privacy.test_distributed import run

pytest.importorskip("opacus")
PRIVATE = "privacy:noise=0.5,clip=1,delta=0.01,accountant=rdp"
SHUFFLE = "shuffle:ratio=0.5,dal=tokens,dal_weight=0.5"
UNUSED = (False, True)  # whether DistributedDataParallel looks for parameters without gradient
STACKS = [PRIVATE, f"{SHUFFLE}+{PRIVATE},physical_batch=2"]


def elastic(rank, world, port):
    """What torchrun tells each process."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "GROUP_RANK": "0",
        "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_RESTART_COUNT": "0", "GROUP_WORLD_SIZE": "1",
        "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip


def outcome(model, guard, steps):
    ledger = guard._ledgers.get("privacy")
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return weights, ledger.history if ledger else [], steps


def with_plain_ddp(stack, folder):
    parts = model, guard, _ = plainly(stack, DistributedDataParallel, epochs=2)
    if torch.distributed.get_rank() == 0:
        saved(f"{folder}/plain", *parts)
    return outcome(model, guard, 4)


def plainly(stack, wrap, *, epochs, path=None):
    """A loop by hand, from what `saved` wrote where there is a path."""
    from tests.integrations.test_accelerate import DATA

    model = small_vit(depth=1)
    guard = vg.protect(model, stack)
    optimizer, loader = guard.prepare(
        torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(DATA, 8)
    )
    if path:
        for part, state in zip((guard, model, optimizer), torch.load(path), strict=True):
            part.load_state_dict(state)
    wrapped = wrap(model)
    for _ in range(epochs):
        for images, labels in loader:
            (F.cross_entropy(wrapped(images), labels) + guard.auxiliary_loss()).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model, guard, optimizer


def saved(path, model, guard, optimizer):
    torch.save([part.state_dict() for part in (guard, model, optimizer)], path)


def with_peft(stack, folder):
    import peft

    from tests.integrations.test_accelerate import DATA

    model = small_vit(depth=1)
    guard = vg.protect(model, stack)
    config = peft.LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["head"])
    model = peft.get_peft_model(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, loader = guard.prepare(torch.optim.SGD(trained, lr=0.1), DataLoader(DATA, 8))
    for _ in range(2):
        for images, labels in loader:
            (F.cross_entropy(model.train()(images), labels) + guard.auxiliary_loss()).backward()
            optimizer.step()
            optimizer.zero_grad()
    return outcome(model, guard, 4)


def with_transformers(stack, folder):
    from tests.integrations import test_transformers as one

    model = one.build()
    guard = vg.protect(model, stack)
    made = one.trainer(
        model, folder, per_device_train_batch_size=4, ddp_backend="gloo", save_strategy="epoch"
    )
    assert made.args.world_size == 2
    made.train()
    return outcome(model, guard, made.state.global_step)


def with_accelerate(stack, folder):
    from tests.integrations import test_accelerate as one

    accelerator = one.accelerate.Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    model, guard = one.guarded(small_vit, stack, seed=None)
    batch = 8 if "privacy" in stack else 4
    parts = one.prepare(accelerator, model, one.sgd(model), DataLoader(one.DATA, batch))
    one.train(accelerator, *parts, guard)
    if "privacy" in stack:
        accelerator.save_state(f"{folder}/state")
    return outcome(model, guard, 4)


def with_lightning(stack, folder):
    from tests.integrations import test_lightning as one

    class Lit(one.Lit):
        def train_dataloader(self):
            return DataLoader(one.DATA, 8 if "privacy" in stack else 4)

    class Guarded(one.GuardMixin, Lit):
        pass

    module = Guarded(stack)
    trainer = one.fit(module, folder=folder, strategy="ddp", devices=2)
    assert trainer.world_size == 2
    trainer.save_checkpoint(f"{folder}/half.ckpt")
    return outcome(module.net, module.guard, trainer.global_step)


TRAINERS = {
    "plain": with_plain_ddp, "transformers": with_transformers, "accelerate": with_accelerate,
    "lightning": with_lightning, "peft": with_peft,
}  # fmt: skip


# what two processes left goes on in one


def plain_goes_on(stack, folder):
    return plainly(stack, torch.nn.Module.train, epochs=1, path=f"{folder}/plain")[1]


def transformers_goes_on(stack, folder):
    from tests.integrations import test_transformers as one

    guard = vg.protect(model := one.build(), stack)
    made = one.trainer(model, folder, per_device_train_batch_size=8, num_train_epochs=3)
    made.train(resume_from_checkpoint=True)
    return guard


def accelerate_goes_on(stack, folder):
    from tests.integrations import test_accelerate as one

    accelerator = one.accelerate.Accelerator(cpu=True)
    model, guard = one.guarded(small_vit, stack, seed=None)
    parts = one.prepare(accelerator, model, one.sgd(model), DataLoader(one.DATA, 8))
    accelerator.load_state(f"{folder}/state")
    one.train(accelerator, *parts, guard, epochs=1)
    return guard


def lightning_goes_on(stack, folder):
    from tests.integrations import test_lightning as one

    class Guarded(one.Guarded):
        def train_dataloader(self):
            return self.private(DataLoader(one.DATA, 8))

    module = Guarded(stack)
    one.fit(module, epochs=3, ckpt_path=f"{folder}/half.ckpt")
    return module.guard


GO_ON = {
    "plain": plain_goes_on, "transformers": transformers_goes_on,
    "accelerate": accelerate_goes_on, "lightning": lightning_goes_on,
}  # fmt: skip


# and what one process left goes on in two


def goes_on_in_two(stack, folder):
    def wrap(model):
        held.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        return DistributedDataParallel(model)

    held = []
    model, guard, _ = plainly(stack, wrap, epochs=1, path=f"{folder}/one")
    return held[0], *outcome(model, guard, 6)


# without privacy: the masks are those of the images, whichever process has them


class Keys:
    """Draw each image's mask from the image, so that one process and two draw the same."""

    def __init__(self, piece):
        self.piece = piece

    def __call__(self, model, args, kwargs):
        images = args[0] if args else kwargs["pixel_values"]
        self.piece.key_examples((1e6 * images[:, 0, 0, 0]).long())


def shuffled(model):
    guard = vg.protect(model, SHUFFLE, generator=torch.Generator().manual_seed(3))
    model.register_forward_pre_hook(Keys(model.vitguard.shuffle), with_kwargs=True)
    return guard


def dal_by_plain_ddp(folder, unused):
    from tests.integrations.test_accelerate import DATA

    model, rank = small_vit(depth=1), torch.distributed.get_rank()
    guard = shuffled(model)
    optimizer = guard.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
    images, labels = (t[8 * rank : 8 * rank + 8] for t in DATA.tensors)
    for _ in range(2):
        (F.cross_entropy(wrapped(images), labels) + guard.auxiliary_loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def dal_by_transformers(folder, unused):
    from tests.integrations import test_transformers as one

    model = one.build()
    shuffled(model)
    one.trainer(
        model, folder, per_device_train_batch_size=8, ddp_backend="gloo",
        ddp_find_unused_parameters=unused,
    ).train()  # fmt: skip
    return model


def dal_by_accelerate(folder, unused):
    from accelerate.utils import DistributedDataParallelKwargs

    from tests.integrations import test_accelerate as one

    given = [DistributedDataParallelKwargs(find_unused_parameters=unused)]
    accelerator = one.accelerate.Accelerator(cpu=True, kwargs_handlers=given)
    model = small_vit(depth=1)
    guard = shuffled(model)
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    parts = one.prepare(accelerator, model, plain, DataLoader(one.DATA, 8))
    one.train(accelerator, *parts, guard)
    return model


def dal_by_lightning(folder, unused):
    from tests.integrations import test_lightning as one

    class Lit(one.L.LightningModule):
        training_step = one.Lit.training_step

        def __init__(self):
            super().__init__()
            self.net = one.build()
            shuffled(self.net)

        def train_dataloader(self):
            return DataLoader(one.DATA, 8)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Guarded(one.GuardMixin, Lit):
        pass

    module = Guarded()
    strategy = "ddp_find_unused_parameters_true" if unused else "ddp"
    one.fit(module, folder=folder, strategy=strategy, devices=2)
    return module.net


DAL = {
    "plain": dal_by_plain_ddp, "transformers": dal_by_transformers,
    "accelerate": dal_by_accelerate, "lightning": dal_by_lightning,
}  # fmt: skip
PAIRS = [("plain", "peft"), ("transformers",), ("accelerate",), ("lightning",)]


def work(rank, world, ports, found, kinds, folder):
    """All that trainers do in two processes: starting such a pair costs more than the training.

    Plain loops need the group to be there; the trainers of other packages open it themselves, or
    go on with the one that is there.
    """
    elastic(rank, world, ports[0])
    if "plain" in kinds:
        torch.distributed.init_process_group("gloo")
    made = {}
    for kind in kinds:
        for stack in STACKS:
            made[kind, stack] = TRAINERS[kind](stack, folder)
        if kind == "plain":
            made["from one"] = goes_on_in_two(STACKS[-1], folder)
        for unused in UNUSED if kind in DAL else ():
            model = DAL[kind](folder, unused)
            made[kind, unused] = {n: p.detach().clone() for n, p in model.named_parameters()}
    found[rank] = made
    torch.distributed.destroy_process_group()


def in_one_process(kind):
    """Two steps on all 16 images."""
    if kind == "transformers":
        from tests.integrations.test_transformers import IMAGES, build

        model, images, labels = build(), IMAGES, torch.arange(16) % 10
    else:
        from tests.integrations import test_accelerate, test_lightning

        model = test_lightning.build() if kind == "lightning" else small_vit(depth=1)
        images, labels = test_accelerate.DATA.tensors
    guard = shuffled(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = guard.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        made = model.train()(images)
        scores = made.logits if kind == "transformers" else made
        (F.cross_entropy(scores, labels) + guard.auxiliary_loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, {n: p.detach() for n, p in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("kinds", PAIRS, ids=" and ".join)
def test_two_processes_end_at_equal_weights_count_each_step_once_and_train_dal_as_one(
    kinds, tmp_path
):
    kinds = [kind for kind in kinds if kind == "plain" or find_spec(kind)]
    if not kinds:
        pytest.skip("needs the package of a trainer")
    if "plain" in kinds:
        alone = plainly(STACKS[-1], torch.nn.Module.train, epochs=2)
        saved(tmp_path / "one", *alone)
    found = run(work, 2, kinds, str(tmp_path))
    if "plain" in kinds:
        first, second = (found[rank]["from one"] for rank in (0, 1))
        left = torch.cat([p.detach().flatten() for p in alone[0].parameters()])
        assert torch.equal(first[0], left) and torch.equal(second[0], left)
        assert torch.equal(first[1], second[1]) and not torch.equal(first[1], left)
        assert first[2] == second[2] == [(0.5, 0.5, 6)]
    for kind in kinds:
        for stack in STACKS:
            (first, history, steps), (second, *others) = (found[r][kind, stack] for r in (0, 1))
            assert torch.equal(first, second) and others == [history, steps], (kind, stack)
            assert steps == 4, (kind, stack)
            assert history == [(0.5, 0.5, 4)], (kind, stack)
        if kind in GO_ON:
            resumed = GO_ON[kind](STACKS[-1], str(tmp_path))  # the state of the last stack is there
            assert resumed._ledgers["privacy"].history == [(0.5, 0.5, 6)], kind
        if kind in DAL:
            before, alone = in_one_process(kind)
            for unused in UNUSED:
                expect_the_weights_of_one(
                    [found[rank][kind, unused] for rank in (0, 1)], alone, before
                )


def expect_the_weights_of_one(found, alone, before):
    assert found[0].keys() == found[1].keys() == alone.keys()
    assert all(torch.equal(t, found[1][n]) for n, t in found[0].items())
    gap = max(float((t - alone[n]).abs().max()) for n, t in found[0].items())
    assert gap < 1e-6
    added = [n for n in alone if n.startswith("vitguard.")]
    assert len(added) > 1 and not any(torch.equal(alone[n], before[n]) for n in added)
