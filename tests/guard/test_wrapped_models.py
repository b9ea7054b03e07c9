"""Models in the wrappers of other libraries: the right result, or a line that says what to do."""

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import vitguard as vg
from vitguard.errors import Incompatible, UnsupportedModel, VitguardError

DATA = TensorDataset(
    torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(8)
)
PRIVATE = "privacy:noise=1,clip=1,delta=0.01,accountant=rdp"


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def prepared(model, stack=PRIVATE, batch=8):
    guard = vg.protect(model, stack)
    return guard, *guard.prepare(sgd(model), DataLoader(DATA, batch))


class Around(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.stem, self.net = nn.Identity(), net

    def forward(self, x):
        return self.net(self.stem(x))


def test_of_a_model_around_a_vit_the_part_to_protect_is_named(small_vit):
    around = Around(small_vit(depth=1))
    with pytest.raises(UnsupportedModel, match=r"protect\(model\.net, \.\.\.\)"):
        vg.protect(around, "shuffle")
    vg.protect(around.net, "shuffle")


def test_a_lightning_module_is_told_which_part_to_protect(small_vit):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.vit = small_vit(depth=1)

    with pytest.raises(UnsupportedModel, match=r"protect\(model\.vit, \.\.\.\)"):
        vg.protect(Module(), "shuffle")


COMPILED = {
    "torch.compile": lambda m: torch.compile(m, backend="eager"),
    "the whole graph": lambda m: torch.compile(m, backend="eager", fullgraph=True),
    "model.compile": lambda m: (m.compile(backend="eager"), m)[1],
    "a step function": lambda m: torch.compile(lambda x: m(x) * 1, backend="eager"),
}


@pytest.mark.parametrize("how", COMPILED)
def test_a_model_compiled_after_prepare_is_refused_before_it_is_traced(small_vit, how):
    pytest.importorskip("opacus")
    model = small_vit(depth=1)
    _, _, loader = prepared(model)
    torch._dynamo.reset()
    compiled = COMPILED[how](model)
    with pytest.raises(Exception, match="that is not compiled under differential privacy"):
        compiled(next(iter(loader))[0])


@pytest.mark.slow
def test_an_evaluation_may_be_compiled(small_vit):
    pytest.importorskip("opacus")
    model = small_vit(depth=1)
    prepared(model)
    torch._dynamo.reset()
    compiled = torch.compile(model.eval(), backend="eager")
    with torch.no_grad():
        assert compiled(DATA.tensors[0]).shape == (8, 10)


@pytest.fixture
def sharded(tmp_path):
    """A function that spreads a model over a group of one process."""
    import torch.distributed as dist

    if not dist.is_gloo_available():
        pytest.skip("torch without gloo")
    if not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip(f"torch {torch.__version__} does not run FSDP2 on a CPU")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (1,))
        yield lambda model: fully_shard(model, mesh=mesh)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("stack", ["noise:scale=0", "client-privacy:noise=0,clip=1e9", "shuffle"])
def test_seal_gathers_what_fsdp_spread(small_vit, sharded, stack):
    model = small_vit(depth=1)
    guard = vg.protect(model, stack)
    guard.will_seal()
    sharded(model)
    optimizer = guard.prepare(sgd(model))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    F.cross_entropy(model(DATA.tensors[0]), DATA.tensors[1]).backward()
    optimizer.step()
    moved = {n: p.detach() - before[n] for n, p in model.named_parameters()}
    sealed = guard.seal(vg.Update(moved, kind="difference", batch_size=8))
    assert type(sealed.tensors["cls_token"]) is torch.Tensor
    assert all(torch.allclose(t, moved[n].full_tensor()) for n, t in sealed.tensors.items())
    assert bool(sealed.tensors["head.bias"].any())


def test_an_update_of_a_spread_model_is_refused(small_vit, sharded):
    model = small_vit(depth=1)
    guard = vg.protect(model, "noise:scale=0.1")
    sharded(model)
    with pytest.raises(Incompatible, match=r"whole parameters for guard\.update"):
        guard.update(*DATA.tensors)


@pytest.mark.parametrize("when", ["before protect", "before prepare", "after prepare"])
def test_privacy_refuses_what_fsdp_spread(small_vit, sharded, when):
    pytest.importorskip("opacus")
    model = small_vit(depth=1)

    def run():
        if when == "before protect":
            sharded(model)
        guard = vg.protect(model, PRIVATE)
        if when == "before prepare":
            sharded(model)
        optimizer, loader = guard.prepare(sgd(model), DataLoader(DATA, 8))
        if when == "after prepare":
            sharded(model)
        F.cross_entropy(model(next(iter(loader))[0]), DATA.tensors[1]).backward()
        optimizer.step()

    with pytest.raises(Incompatible, match="spread over processes by FSDP"):
        run()


# training that says nothing of an update


def trained(model, optimizer):
    F.cross_entropy(model(DATA.tensors[0]), DATA.tensors[1]).backward()
    optimizer.step()


@pytest.mark.parametrize("stack", ["noise:scale=0.1", "client-privacy", "pruning", "encryption"])
def test_the_first_step_says_that_defenses_of_the_update_do_not_act_on_training(small_vit, stack):
    model = small_vit(depth=1)
    vg.protect(model, stack)
    optimizer = sgd(model)
    with pytest.warns(UserWarning, match=r"would not act on the weights.*keep_local"):
        trained(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(model, optimizer)  # once


def kept_local(guard):
    guard.keep_local()
    return nullcontext()


def sealed_later(guard):
    guard.will_seal()
    return nullcontext()


def released(guard):
    guard.release()
    return nullcontext()


SAID = {
    "keep_local": kept_local, "will_seal": sealed_later, "release": released,
    "round": lambda guard: guard.round(1, base="start"),
}  # fmt: skip


@pytest.mark.parametrize("said", SAID)
def test_training_that_says_where_its_update_goes_is_quiet(small_vit, said):
    model = small_vit(depth=1)
    guard = vg.protect(model, "noise:scale=0.1")
    with warnings.catch_warnings(), SAID[said](guard):
        warnings.simplefilter("error")
        trained(model, sgd(model))


def test_guard_update_is_quiet_and_other_stacks_are(small_vit):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = small_vit(depth=1)
        guard = vg.protect(model, "noise:scale=0.1")
        guard.update(*DATA.tensors, learning_rate=0.1, local_steps=2)
        other = small_vit(depth=1)
        vg.protect(other, "positions:kind=sincos")
        trained(other, sgd(other))


def test_nothing_leaves_after_keep_local(small_vit):
    guard = vg.protect(small_vit(depth=1), "noise:scale=0.1")
    guard.keep_local()
    zeros = {"cls_token": torch.zeros(1, 1, 96)}
    for leaves in (
        lambda: guard.update(*DATA.tensors),
        lambda: guard.seal(vg.Update(zeros, kind="difference", batch_size=1)),
    ):
        with pytest.raises(VitguardError, match=r"guard\.keep_local"):
            leaves()


# groups of an optimizer


def test_no_weight_decay_names_the_models_embeddings_and_those_that_defenses_added(small_vit):
    model = small_vit(depth=1)
    guard = vg.protect(model, "shuffle:ratio=0.5,dal=tokens")
    own = {"pos_embed", "cls_token", "dist_token"}
    assert guard.no_weight_decay() == {*own, "vitguard.shuffle.unknown"} | model.no_weight_decay()
    assert own <= model.no_weight_decay()  # older releases of timm leave registers out


@pytest.mark.parametrize("decay", [0.5, None])
def test_what_timm_groups_after_protect_ends_in_the_group_of_its_like(small_vit, decay):
    from timm.optim import create_optimizer_v2

    model = small_vit(depth=1)
    guard = vg.protect(model, "shuffle:ratio=0.5,dal=tokens")
    made = create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=0.1, layer_decay=decay)
    optimizer = guard.prepare(made)

    def group(name):
        own = model.get_parameter(name)
        return next(g for g in optimizer.param_groups if any(p is own for p in g["params"]))

    assert group("vitguard.shuffle.unknown") is group("pos_embed")
    assert group("pos_embed")["weight_decay"] == 0
    assert group("vitguard.shuffle.head.layers.0.weight") is group("head.weight")
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len([*model.parameters()])


def test_a_group_made_for_what_a_defense_added_stays(small_vit):
    model = small_vit(depth=1)
    guard = vg.protect(model, "shuffle:ratio=0.5,dal=tokens")
    ours = [p for n, p in model.named_parameters() if n.startswith("vitguard")]
    rest = [p for n, p in model.named_parameters() if not n.startswith("vitguard")]
    made = torch.optim.SGD([{"params": rest}, {"params": ours, "lr": 1.0}], lr=0.1)
    assert len(guard.prepare(made).param_groups[1]["params"]) == 3


# examples without a finite gradient


def test_examples_without_a_finite_gradient_are_left_out_and_said_once(small_vit):
    pytest.importorskip("opacus")
    model = small_vit(depth=1)
    before = copy.deepcopy(model.state_dict())
    images = DATA.tensors[0].clone()
    images[2] = torch.nan
    guard = vg.protect(model, "privacy:noise=0,clip=1,delta=0.01,accountant=rdp")
    loader = DataLoader(TensorDataset(images, DATA.tensors[1]), 8)
    optimizer, loader = guard.prepare(sgd(model), loader)
    with pytest.warns(UserWarning, match="1 of 8 examples") as said:
        for _ in range(2):
            for x, y in loader:
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
    assert len(said) == 1 and optimizer.left_out == 2
    assert all(bool(torch.isfinite(t).all()) for t in model.state_dict().values())
    assert not torch.equal(before["head.weight"], model.head.weight)
