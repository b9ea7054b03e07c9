"""A head, adapters or weights that came after protect: a plain gradient of them is seen too."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import vitguard as vg
from tests.conftest import small_vit
from vitguard.errors import Unprotected

pytest.importorskip("opacus")
IMAGES = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(16) % 10
PRIVATE = "privacy:noise=0.5,clip=1,delta=0.01,accountant=rdp"


def new_head(model):
    model.requires_grad_(False)
    model.reset_classifier(10)
    return model.head.parameters()


def adapters(model):
    peft = pytest.importorskip("peft")
    kind = peft.LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False)
    return [p for p in peft.get_peft_model(model, kind).parameters() if p.requires_grad]


def assigned(model):
    state = {n: t.clone() for n, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model.parameters()


def whole(model):
    return model.eval()(IMAGES[:4])


def cached(model):
    with torch.no_grad():
        features = model.eval().forward_head(model.forward_features(IMAGES[:4]), pre_logits=True)
    return model.head(features)


def privately(model, guard):
    own = [p for p in model.train().parameters() if p.requires_grad]
    optimizer, loader = guard.prepare(torch.optim.SGD(own, lr=0.1), DataLoader(
        TensorDataset(IMAGES, LABELS), 8
    ))  # fmt: skip
    for images, labels in loader:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def change(model):
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    tensors = {n: torch.ones_like(p) for n, p in named.items()}
    return vg.Update(tensors, kind="difference", batch_size=8, learning_rate=0.1)


@pytest.mark.parametrize("when", ["before prepare", "after private steps"])
@pytest.mark.parametrize(
    ("later", "passes"), [(new_head, whole), (new_head, cached), (adapters, whole),
                          (assigned, whole)]
)  # fmt: skip
def test_a_plain_gradient_of_what_came_later_moves_nothing_and_is_not_sealed(later, passes, when):
    model = small_vit(depth=1)
    guard = vg.protect(model, PRIVATE)
    if when == "after private steps":
        privately(model, guard)
    optimizer = torch.optim.SGD(later(model), lr=0.1)
    F.cross_entropy(passes(model), LABELS[:4]).backward()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(Unprotected, match="neither"):
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    optimizer.zero_grad()
    privately(model, guard)
    with pytest.raises(Unprotected, match="got a plain one"):
        guard.seal(change(model))


@pytest.mark.parametrize("when", ["before prepare", "after private steps"])
def test_a_gradient_that_leaves_nothing_in_what_came_later_is_not_sealed(when):
    model = small_vit(depth=1)
    guard = vg.protect(model, PRIVATE)
    if when == "after private steps":
        privately(model, guard)
    head = list(new_head(model))
    torch.autograd.grad(F.cross_entropy(whole(model), LABELS[:4]), head)
    privately(model, guard)
    with pytest.raises(Unprotected, match="got a plain one"):
        guard.seal(change(model))


@pytest.mark.parametrize("transform", [True, False])
def test_a_gradient_of_tensors_in_the_place_of_parameters_is_not_sealed(transform):
    model = small_vit(depth=1)
    guard = vg.protect(model, PRIVATE)
    privately(model, guard)
    guard.seal(change(model))
    weights = {n: p.detach().clone() for n, p in model.eval().named_parameters()}

    def loss(weights):
        outputs = torch.func.functional_call(model, weights, (IMAGES[:4],))
        return F.cross_entropy(outputs, LABELS[:4])

    with torch.no_grad():
        loss(weights)  # weights of an average, say
    guard.seal(change(model))
    if transform:
        torch.func.grad(loss)(weights)
    else:
        loss({n: p.requires_grad_() for n, p in weights.items()}).backward()
    with pytest.raises(Unprotected, match="got a plain one"):
        guard.seal(change(model))


@pytest.mark.parametrize("stack", [PRIVATE, "shuffle:ratio=0.5,mask=uniform"])
def test_a_model_moves_where_torch_swaps_its_parameters(stack):
    """torch swaps no tensor that something refers to weakly."""
    model = small_vit(depth=1)
    guard = vg.protect(model, stack)
    guard.prepare(torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(
        TensorDataset(IMAGES, LABELS), 8
    ))  # fmt: skip
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert model.head.weight.dtype == torch.float64
