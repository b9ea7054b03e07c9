"""A server that writes frozen weights and adapters, and reads the gradients of adapters alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vitguard as vg
from vitguard import data
from vitguard.attacks.imprint import ImprintReading
from vitguard.core import LocalTraining, Normalization
from vitguard.guard import protect
from vitguard.metrics import recovered
from vitguard.models import build_model
from vitguard.threats import MaliciousServer
from vitguard.threats.malicious_server import craft_types
from vitguard.vit import Anatomy

SPEC = (
    "vit_tiny_patch16_224:img_size=16,patch_size=4,embed_dim=60,depth=3,num_heads=4,mlp_ratio=4,"
    "num_classes=10"
)
PLAIN = Normalization()


class Bottleneck(nn.Module):
    """Down to `rank`, a step, up again."""

    def __init__(self, width, rank, act=F.gelu):
        super().__init__()
        self.down, self.up, self.act = nn.Linear(width, rank), nn.Linear(rank, width), act
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.up(self.act(self.down(x)))


def reads_output(module, _, output):
    return output + module.adapter(output)


def reads_input(module, args, output):
    return output + module.adapter(args[0])


def adapters(rank=8, hook=reads_output, act=F.gelu, spec=SPEC):
    """Return a model of which only bottlenecks beside its MLPs and the head are trained."""
    torch.manual_seed(0)
    model = build_model(spec)
    model.requires_grad_(False)
    for block in model.blocks:
        block.mlp.adapter = Bottleneck(model.embed_dim, rank, act)
        block.mlp.register_forward_hook(hook)
    model.head.requires_grad_(True)
    return model


def lora(rank=8, targets=("fc1",), spec=SPEC, **settings):
    """Return a model of PEFT, of which LoRA and the head are trained."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=rank, target_modules=list(targets), modules_to_save=["head"], **settings
    )
    return peft.get_peft_model(build_model(spec), config)


KINDS = {
    "adapters behind the MLP": lambda rank=8: adapters(rank),
    "adapters beside the MLP": lambda rank=8: adapters(rank, reads_input),
    "adapters of ReLU": lambda rank=8: adapters(rank, act=F.relu),
    "LoRA on fc1": lora,
    "LoRA on all linear layers": lambda rank=8: lora(rank, ("qkv", "attn.proj", "fc1", "fc2")),
}
ATTENTION = {"LoRA on qkv": lambda rank=4: lora(rank, ("qkv",))}


def exposed(model, pixels, threat=None, defenses="none", **how):
    threat = threat or MaliciousServer()
    guard = protect(model.train(), defenses)
    guard.model.load_state_dict({**guard.model.state_dict(), **threat.hand_out(guard)})
    with guard.rewound():
        update = guard.update(PLAIN.apply(pixels), torch.arange(len(pixels)) % 10, **how)
    return threat.view(guard, update, PLAIN)


def share(guess, pixels):
    return float(recovered(guess.images, guess.verified, pixels, (4, 4)).double().mean())


@pytest.fixture(scope="module")
def photos():
    return data.sample_images((16, 16), count=4, classes=10).pixels


@pytest.mark.parametrize("kind", {**KINDS, **ATTENTION})
@pytest.mark.parametrize("craft", sorted(craft_types()))
def test_a_craft_for_adapters_changes_neither_keys_shapes_nor_dtypes(kind, craft):
    guard = protect({**KINDS, **ATTENTION}[kind](), ())
    own = guard.public_model()
    before = {k: t.clone() for k, t in own.state_dict().items()}
    made = craft_types()[craft]().weights(own)
    assert {k: (t.shape, t.dtype) for k, t in made.items()} == {
        k: (t.shape, t.dtype) for k, t in before.items()
    }
    assert list(made) == list(before)
    assert all(torch.equal(t, before[k]) for k, t in own.state_dict().items())
    assert any(not torch.equal(t, before[k]) for k, t in made.items())


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_read_from_the_gradients_of_adapters_alone(photos, kind):
    view = exposed(KINDS[kind](), photos[:1])
    fc1 = [n for n in view.update.tensors if n.endswith(("fc1.weight", "fc1.bias"))]
    assert not fc1 and "patch_embed.proj.weight" not in view.update.tensors
    guess = ImprintReading().run(view, torch.Generator())
    assert share(guess, photos[:1]) == 1.0


@pytest.mark.parametrize("kind", ATTENTION)
def test_attention_heads_are_bins_for_low_rank_matrices_beside_the_values(photos, kind):
    """Four heads in each of two blocks: eight of sixteen positions in a round."""
    view = exposed(ATTENTION[kind](), photos[:1])
    assert not any("mlp" in n for n in view.update.tensors)
    guess = ImprintReading().run(view, torch.Generator())
    assert share(guess, photos[:1]) == 0.5
