"""Small Vision Transformers of which adapters or low-rank matrices and the head are trained."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitguard.models import build_model

SPEC = (
    "vit_tiny_patch16_224:img_size=16,patch_size=4,embed_dim=60,depth=3,num_heads=4,mlp_ratio=4,"
    "num_classes=10"
)


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


def adapters(rank=8, hook=reads_output, act=F.gelu, spec=SPEC, at=("mlp",)):
    """Return a model of which only bottlenecks of its MLPs, or `at`, and the head are trained."""
    torch.manual_seed(0)
    model = build_model(spec)
    model.requires_grad_(False)
    for block in model.blocks:
        for part in map(block.get_submodule, at):
            part.adapter = Bottleneck(model.embed_dim, rank, act)
            part.register_forward_hook(hook)
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
