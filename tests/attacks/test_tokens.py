"""What one known token put into the gradient of the first block."""

from __future__ import annotations

import pytest
import torch

from vitguard.attacks.gelu_span.tokens import TokenGradients
from vitguard.core import Normalization
from vitguard.vit import Anatomy

FROZEN = "positions:kind=frozen"
LAYERS = ("mlp.fc1", "mlp.fc2", "attn.proj")


def truth(view, pixels, labels):
    """Streams h, attended values o, and autograd's gradients at the outputs of the layers."""
    model, inputs, outputs = view.model.eval().double(), {}, {}
    hooks = []
    block = model.blocks[0]
    for name in LAYERS:

        def keep(_module, entered, made, name=name):
            made.retain_grad()
            inputs[name], outputs[name] = entered[0].detach(), made

        hooks.append(block.get_submodule(name).register_forward_hook(keep))
    hooks.append(block.norm2.register_forward_pre_hook(lambda _m, x: inputs.update(h=x[0])))
    torch.nn.functional.cross_entropy(
        model(Normalization().apply(pixels.double())), labels
    ).backward()
    for hook in hooks:
        hook.remove()
    errors = [outputs[name].grad.flatten(0, 1) for name in LAYERS]
    return inputs["h"].detach().flatten(0, 1), inputs["attn.proj"].flatten(0, 1), errors


@pytest.mark.parametrize("changes", [{}, {"init_values": 0.5}, {"act_layer": "relu"}])
def test_the_part_of_a_known_token_is_its_gradient(small_vit, observe, photos, changes):
    model, labels = small_vit(**changes).double(), torch.tensor([1, 2, 3])
    view = observe(model, photos[:3].double(), labels, defenses=FROZEN).gradient()
    anatomy = Anatomy.of(view.model)
    tokens = 3 * anatomy.tokens
    gradients = TokenGradients.of(view, anatomy, tokens)
    stream, attended, errors = truth(view, photos[:3], labels)
    some = torch.arange(0, tokens, 3)
    parts, proved = gradients.parts(stream[some], attended[some])
    assert bool(proved.all())
    assert len(parts) == len(some)
    for made, true in zip(parts.errors, errors, strict=True):
        gap = (made - true[some]).norm(dim=1) / true[some].norm(dim=1)
        assert float(gap.max()) < 1e-6
    rest = gradients.without([parts])
    for name in LAYERS:
        weight = f"blocks.0.{name}.weight"
        values, left = torch.linalg.svdvals(rest.read(weight)), tokens - len(some)
        assert float(values[left] / values[left - 1]) < 1e-4


def test_what_is_no_token_stays_in(small_vit, observe, photos):
    labels = torch.tensor([1, 2, 3])
    view = observe(small_vit(), photos[:3], labels, defenses=FROZEN).gradient()
    anatomy = Anatomy.of(view.model)
    gradients = TokenGradients.of(view, anatomy, 3 * anatomy.tokens)
    stream, attended, _ = truth(view, photos[:3], labels)
    between = 0.5 * (stream + stream.roll(1, 0))
    assert len(gradients.parts(between, attended)[0]) == 0
    near = stream + 0.05 * stream.std() * torch.randn(stream.shape, dtype=stream.dtype)
    assert len(gradients.parts(near, attended)[0]) == 0
    whole = gradients.without([gradients.parts(between, attended)[0]])
    for name, tensor in view.update.tensors.items():
        assert torch.equal(whole.read(name), tensor.double())
