"""Small models of every family, and draws that are keyed to the example."""

import pytest
import timm
import torch
from torch import nn

from tests.conftest import known

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
WINDOWED = {
    "img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 2),
    "num_heads": (2, 2),
}  # fmt: skip


def timm_model(name, sizes=SMALL, **settings):
    return timm.create_model(known(name), num_classes=10, **sizes, **settings)


def hugging_face(kind="ViT", **settings):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 8, "num_labels": 10,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**sizes, **settings)
    return getattr(transformers, f"{kind}ForImageClassification")(config)


def torchvision_vit():
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64,
        num_classes=10,
    )  # fmt: skip


def with_lora():
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj", "query", "value"], modules_to_save=["classifier"]
    )
    model = peft.get_peft_model(hugging_face(), settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)  # zero at first: the other factor would have no gradient
    return model


def frozen_backbone():
    model = timm_model("vit_tiny_patch16_224")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("head", "blocks.1")) or name == "cls_token")
    return model


def only_biases():
    model = timm_model("vit_tiny_patch16_224")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("bias" in name)
    return model


def without_dropout(model):
    """Its table of relative positions comes from a network with dropout, one draw a batch."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


FAMILIES = {
    "vit": lambda: timm_model("vit_tiny_patch16_224"),
    "average-pooling": lambda: timm_model(
        "vit_tiny_patch16_224", global_pool="avg", class_token=False
    ),
    "attention-pooling": lambda: timm_model("vit_base_patch16_siglip_224"),
    "deit-distilled": lambda: timm_model("deit_tiny_distilled_patch16_224"),
    "registers": lambda: timm_model("vit_small_patch14_reg4_dinov2"),
    "layer-scale": lambda: timm_model("vit_tiny_patch16_224", init_values=0.1),
    "cait": lambda: timm_model("cait_xxs24_224"),
    "swin": lambda: timm_model("swin_tiny_patch4_window7_224", WINDOWED, drop_path_rate=0.0),
    "swin-v2": lambda: timm_model("swinv2_tiny_window8_256", WINDOWED, drop_path_rate=0.0),
    "eva-02": lambda: timm_model("eva02_tiny_patch14_224"),
    "rope": lambda: timm_model("vit_small_patch16_rope_224"),
    "rope-mixed": lambda: timm_model("vit_small_patch16_rope_mixed_224"),
    "beit": lambda: timm_model("beit_base_patch16_224"),
    "relative-positions": lambda: without_dropout(timm_model("vit_relpos_small_patch16_224")),
    "query-key-norm": lambda: timm_model("vit_tiny_patch16_224", qk_norm=True),
    "hugging-face": hugging_face,
    "hugging-face-registers": lambda: hugging_face("Dinov2WithRegisters"),
    "hugging-face-beit": lambda: hugging_face(
        "Beit", use_relative_position_bias=True, drop_path_rate=0.0
    ),
    "torchvision": torchvision_vit,
    "frozen-backbone": frozen_backbone,
    "only-biases": only_biases,
    "lora": with_lora,
}


def build(family, dtype=torch.float64, sizes=SMALL, **settings):
    """Return a small model with no parameter left at a special value."""
    torch.manual_seed(0)
    model = FAMILIES[family]() if family in FAMILIES else timm_model(family, sizes, **settings)
    model = model.to(dtype).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return model


class KeyedDraws:
    """Replace drop path and dropout so that each example's draws follow its own key."""

    def __init__(self, model, rate=0.3):
        self.keys = None
        self.rate = rate
        self.calls = 0
        model.register_forward_pre_hook(self._restart)
        for name, module in list(model.named_modules()):
            if type(module).__name__ == "DropPath" or name.endswith(("drop_path1", "drop_path2")):
                self._replace(model, name, Keyed(self, whole=True))
            elif isinstance(module, nn.Dropout):
                self._replace(model, name, Keyed(self, whole=False))

    def _restart(self, module, args):
        self.calls = 0

    @staticmethod
    def _replace(model, name, module):
        path, _, last = name.rpartition(".")
        setattr(model.get_submodule(path), last, module)


class Keyed(nn.Module):
    def __init__(self, draws, whole):
        super().__init__()
        self.draws = [draws]
        self.whole = whole
        self.p = 0.0  # fused attention reads it

    def forward(self, x):
        if not self.training:
            return x
        draws = self.draws[0]
        draws.calls += 1
        masks = []
        for key in draws.keys:
            generator = torch.Generator().manual_seed(int(key) * 1000 + draws.calls)
            shape = (1,) * (x.dim() - 1) if self.whole else x.shape[1:]
            masks.append(torch.rand(shape, generator=generator) >= draws.rate)
        return x * torch.stack(masks).to(x.dtype) / (1 - draws.rate)
