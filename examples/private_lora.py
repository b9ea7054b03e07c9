"""Fine-tune a pretrained ViT under differential privacy by LoRA and a fresh head.

    python examples/private_lora.py --images FOLDER --checkpoint FILE \\
        --model vit_small_patch14_dinov2:img_size=112 --epsilon 2 --out runs/lora

FOLDER has one folder of images for each class. The adapters stand beside query, key and value in
every block; they and the head are all that is trained, clipped and noised, and noise on so few
values costs less accuracy than on a whole model. The head starts at zero and reads features that
public photos centre and scale: what all features share would otherwise take up most of the clip.
Afterwards adapters and scale are folded in, so that a plain timm model loads the result. Without
FOLDER it trains on images that are made here. Where adapters are not needed,
`private_head.py` computes features once and is far faster: try it first.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from private_head import LENGTH, SMALL, built, features, opened
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import vitguard as vg
from vitguard.data import sample_photos


class Scaled(nn.Module):
    """A linear head on features that are centred and scaled: (batch, width) to (batch, classes)."""

    def __init__(self, width: int, classes: int, centre: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(width, classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("centre", centre)
        self.register_buffer("scale", scale)

    def forward(self, vectors: Tensor) -> Tensor:
        return self.linear((vectors - self.centre) * self.scale)


def with_adapters(
    model: nn.Module, public: Tensor, classes: int, rank: int, strength: float
) -> nn.Module:
    """Return a timm ViT with LoRA on query, key and value, and a fresh head that is trained.

    Args:
        public: Images as the model takes them, (count, channels, height, width): they set how
            features are centred and scaled.
        strength: What the adapters' output is multiplied with, times `rank`.
    """
    vectors, _ = features(model.eval(), [(public, torch.zeros(len(public)))])
    centre = vectors.mean(0)
    scale = LENGTH / (vectors - centre).norm(dim=1).mean()
    model.reset_classifier(classes)  # the width of the head is that of the features
    model.head = Scaled(vectors.shape[1], classes, centre.clone(), scale.clone())
    settings = peft.LoraConfig(
        r=rank, lora_alpha=round(strength * rank), target_modules=["qkv"], modules_to_save=["head"]
    )
    return peft.get_peft_model(model, settings)


def train(
    model: nn.Module, data: Dataset[Any], private: vg.DifferentialPrivacy | None, *,
    epochs: int, batch: int, rate: float,
) -> vg.Guard:  # fmt: skip
    """Train what `model` has to train, by Adam, and put the mean of the later half in its place."""
    guard = vg.protect(model.train(), [] if private is None else [private])
    held = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer, loader = guard.prepare(
        torch.optim.Adam(held.values(), lr=rate), DataLoader(data, batch, shuffle=True)
    )
    total, count = {n: torch.zeros_like(p) for n, p in held.items()}, 0
    for epoch in range(epochs):
        for images, labels in loader:
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            if epoch >= epochs // 2:
                count += 1
                for name, parameter in held.items():
                    total[name] += parameter.detach()
    with torch.no_grad():
        for name, parameter in held.items():
            parameter.copy_(total[name] / count)
    return guard


def folded(model: Any, plain: nn.Module) -> nn.Module:
    """Return a plain timm model that says what the trained one says: adapters and scale folded."""
    merged = model.merge_and_unload()
    head = merged.head
    with torch.no_grad():
        weight = head.linear.weight * head.scale
        bias = head.linear.bias - weight @ head.centre
    state = {n: t for n, t in merged.state_dict().items() if not n.startswith("head.")}
    plain.load_state_dict({**state, "head.weight": weight, "head.bias": bias})
    return plain.eval()


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, fold adapters and head in, and save the model and what was spent."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--images", type=Path, help="one folder of images for each class")
    made.add_argument("--model", default=SMALL, help="a timm name with arguments")
    made.add_argument("--checkpoint", type=Path, help="weights of the backbone")
    made.add_argument("--epsilon", type=float, default=2.0)
    made.add_argument("--epochs", type=int, default=6)
    made.add_argument("--batches", type=int, default=5, help="steps in an epoch")
    made.add_argument("--rate", type=float, default=0.02)
    made.add_argument("--rank", type=int, default=4)
    made.add_argument("--strength", type=float, default=4.0, help="of the adapters")
    made.add_argument("--at-once", type=int, default=250, help="images in memory at once")
    made.add_argument("--out", type=Path, default=Path("runs/lora"))
    options = made.parse_args(arguments)

    backbone, transform, data, names = opened(options.model, options.checkpoint, options.images)
    public = torch.stack([transform(photo) for photo in sample_photos().values()])

    model = with_adapters(backbone, public, len(names), options.rank, options.strength)
    private = vg.DifferentialPrivacy(
        epsilon=options.epsilon, epochs=options.epochs, delta=min(1e-5, 0.5 / len(data)),
        physical_batch=options.at_once,
    )  # fmt: skip
    batch = -(-len(data) // options.batches)
    guard = train(model, data, private, epochs=options.epochs, batch=batch, rate=options.rate)
    spent = guard.privacy_spent()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model = folded(model, built(options.model, len(names)))
    with torch.inference_mode():
        found = [(model(images).argmax(1) == labels).double() for images, labels in
                 DataLoader(data, 50)]  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), options.out / "model.pt")
    told = {"epsilon": spent.epsilon, "delta": spent.delta, "steps": spent.steps, "classes": names}
    (options.out / "privacy.json").write_text(json.dumps(told, indent=2) + "\n")
    right = float(torch.cat(found).mean())
    print(f"{trained} values trained; {right:.1%} of {len(data)} training images right; {spent}")


if __name__ == "__main__":
    main()
