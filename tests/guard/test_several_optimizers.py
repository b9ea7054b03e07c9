"""What a defense added is trained once and its schedule counts a step once, whatever steps."""

import pytest
import torch
import torch.nn.functional as F

import vitguard as vg
from tests.conftest import small_vit
from vitguard.errors import Incompatible, InputError, Unprotected

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(4)
STACK = "shuffle:ratio=0.5,mask=uniform,dal=tokens,schedule=linear,steps=100"


def sgd(parameters):
    return torch.optim.SGD(list(parameters), lr=0.1)


def protected(stack=STACK):
    model = small_vit(depth=1)
    return model, vg.protect(model, stack)


def loss_of(model, guard):
    return F.cross_entropy(model(IMAGES), LABELS) + guard.auxiliary_loss()


def named(model, *, head):
    own = ((n, p) for n, p in model.named_parameters() if "vitguard" not in n)
    return [p for n, p in own if n.startswith("head.") == head]


def holders(model, optimizers):
    """Return, for each parameter that the defense added, which optimizers have it."""
    return {
        n: [i for i, o in enumerate(optimizers) if any(q is p for g in o.param_groups
                                                       for q in g["params"])]
        for n, p in model.vitguard.named_parameters()
    }  # fmt: skip


@pytest.mark.parametrize("first", [True, False])
def test_of_two_prepared_optimizers_one_trains_what_was_added(first):
    model, guard = protected()
    optimizers = [guard.prepare(sgd(named(model, head=h))) for h in (first, not first)]
    body = 1 if first else 0
    where = holders(model, optimizers)
    assert all(len(held) == 1 for held in where.values())
    assert where["shuffle.unknown"] == [body]
    before = {n: p.detach().clone() for n, p in model.vitguard.named_parameters()}
    for _ in range(3):
        loss_of(model, guard).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert guard.model.vitguard.shuffle.step == 3
    after = dict(model.vitguard.named_parameters())
    assert not torch.equal(after["shuffle.head.layers.0.weight"],
                           before["shuffle.head.layers.0.weight"])  # fmt: skip


def test_an_embedding_leaves_an_optimizer_of_matrices_for_the_one_of_its_like():
    model, guard = protected("shuffle:ratio=0.5,mask=uniform")
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    rest = [p for n, p in model.named_parameters() if "vitguard" not in n
            and not any(p is m for m in matrices)]  # fmt: skip
    optimizers = [guard.prepare(sgd(matrices)), guard.prepare(sgd(rest))]
    assert holders(model, optimizers) == {"shuffle.unknown": [1]}


def around(model, guard):
    from timm.optim import Lookahead

    optimizer = guard.prepare(Lookahead(sgd(named(model, head=True) + named(model, head=False))))

    def step():
        loss_of(model, guard).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def with_a_closure(model, guard):
    optimizer = guard.prepare(sgd(model.parameters()))

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, guard)
        loss.backward()
        return loss

    return lambda: optimizer.step(closure)


def inside_the_backward_pass(model, guard):
    """As torch's tutorial has it: an optimizer for each parameter, which spares the gradients."""
    optimizers = {p: sgd([p]) for p in model.parameters()}

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(step)
    return lambda: loss_of(model, guard).backward()


@pytest.mark.parametrize("way", [around, with_a_closure, inside_the_backward_pass])
def test_a_schedule_counts_each_step_once(way):
    model, guard = protected()
    step = way(model, guard)
    for done in range(1, 4):
        step()
        assert model.vitguard.shuffle.step == done


def test_optimizers_for_each_parameter_that_leave_some_out_are_refused():
    model, guard = protected()
    for parameter in named(model, head=False) + named(model, head=True):
        optimizer = sgd([parameter])
        parameter.register_post_accumulate_grad_hook(lambda _, o=optimizer: o.step())
    loss_of(model, guard).backward()
    with pytest.raises(Unprotected, match="trains what the defense added"):
        loss_of(model, guard).backward()


@pytest.mark.parametrize("left", [True, False])
def test_a_gradient_of_eval_mode_that_is_still_there_is_not_stepped_on(left):
    model, guard = protected("shuffle:ratio=0.5,mask=uniform")
    optimizer = guard.prepare(sgd(model.parameters()))
    F.cross_entropy(model.eval()(IMAGES), LABELS).backward()
    if not left:
        optimizer.zero_grad(set_to_none=False)
    F.cross_entropy(model.train()(IMAGES), LABELS).backward()
    before = model.head.weight.detach().clone()
    if left:
        with pytest.raises(Unprotected, match="zero_grad"):
            optimizer.step()
    else:
        optimizer.step()
    assert torch.equal(model.head.weight, before) == left


def new_head(model):
    model.reset_classifier(4)


def assigned(model):
    model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize("replace", [new_head, assigned])
@pytest.mark.parametrize("stack", [STACK, "positions:kind=sincos"])
def test_a_step_that_would_leave_out_what_was_replaced_is_refused(stack, replace):
    model, guard = protected(stack)
    optimizer = guard.prepare(sgd(model.parameters()))
    replace(model)
    before = model.head.weight.detach().clone()
    loss_of(model, guard).backward()
    with pytest.raises(Incompatible, match=r"another .* in its place"):
        optimizer.step()
    with pytest.raises(Incompatible, match=r"another .* in its place|got one of others alone"):
        guard.prepare(optimizer)  # as a trainer does in its second run
    assert torch.equal(model.head.weight, before)
    guard.prepare(sgd(model.parameters())).step()
    assert not torch.equal(model.head.weight, before)


@pytest.mark.parametrize("own", [True, False])
def test_an_optimizer_of_the_old_head_goes_on_where_something_trains_the_new_one(own):
    model, guard = protected()
    optimizer = beside = guard.prepare(sgd(model.parameters()))
    model.reset_classifier(4)
    if own:
        optimizer.add_param_group({"params": list(model.head.parameters())})
    else:
        beside = guard.prepare(sgd(model.head.parameters()))
    before = model.head.weight.detach().clone()
    loss_of(model, guard).backward()
    optimizer.step()
    beside.step()
    assert not torch.equal(model.head.weight, before)


def test_an_optimizer_that_shared_its_parameters_out_already_is_refused(tmp_path):
    if not torch.distributed.is_gloo_available():
        pytest.skip("torch without gloo")
    from torch.distributed.optim import ZeroRedundancyOptimizer

    group = {"init_method": f"file://{tmp_path}/group", "rank": 0, "world_size": 1}
    torch.distributed.init_process_group("gloo", **group)
    try:
        model = small_vit(depth=1)
        early = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
        guard = vg.protect(model, STACK)
        with pytest.raises(InputError, match="after protect"):
            guard.prepare(early)
        late = guard.prepare(ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1))
        loss_of(model, guard).backward()
        late.step()
        assert model.vitguard.shuffle.step == 1
    finally:
        torch.distributed.destroy_process_group()
