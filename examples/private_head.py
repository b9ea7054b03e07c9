"""Train the head of a pretrained ViT under differential privacy: features once, then one layer.

    python examples/private_head.py --images FOLDER --checkpoint FILE \\
        --model vit_small_patch14_dinov2:img_size=112 --epsilon 2 --out runs/head

FOLDER has one folder of images for each class. The backbone stays as it is, so what it makes of a
record depends on that record alone and spends nothing. The features are centred and scaled by those
of public photos: what all features share would otherwise take up most of the clip. Afterwards the
trained layer is folded into the model's own head, so that a plain timm model loads the result.
Without FOLDER it trains on images that are made here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import ImageFolder

import vitguard as vg
from vitguard.data import sample_photos
from vitguard.draws import Draws
from vitguard.models import build_model, load_checkpoint

LENGTH = 10.0  # of the public features on average: their gradients reach a clip of 1
SMALL = "vit_tiny_patch16_224:img_size=32,patch_size=8,embed_dim=48,depth=2,num_heads=3"


@torch.inference_mode()
def features(model: nn.Module, batches: Iterable[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
    """Return what the head reads of each image, (count, width), and the labels."""
    made = [
        (model.forward_head(model.forward_features(images), pre_logits=True), labels)
        for images, labels in batches
    ]
    vectors, labels = (torch.cat(part) for part in zip(*made, strict=True))
    return vectors, labels


def made_here(transform, count: int = 400) -> TensorDataset:
    """Return noise around one colour for each of four classes, as a model takes it."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 4
    colours = torch.rand(4, 3, 1, 1, generator=generator)
    pixels = (colours[labels] + 0.3 * torch.randn(count, 3, 32, 32, generator=generator)).clamp(
        0, 1
    )
    return TensorDataset(transform.transforms[-1](pixels), labels)


def built(model: str, classes: int) -> nn.Module:
    """Return a timm model of a name with arguments, with a head of so many classes."""
    return build_model(f"{model}{',' if ':' in model else ':'}num_classes={classes}")


def opened(model: str, checkpoint: Path | None, images: Path | None) -> tuple:
    """Return a backbone without a head, what it wants done to an image, the data, its classes."""
    backbone = built(model, 0)
    if checkpoint:
        load_checkpoint(backbone, checkpoint)
    config = resolve_model_data_config(backbone)
    config |= {"input_size": (3, *backbone.patch_embed.img_size), "crop_pct": 1.0}
    transform = create_transform(**config)
    data = ImageFolder(images, transform) if images else made_here(transform)
    names = data.classes if isinstance(data, ImageFolder) else list("0123")
    return backbone.eval(), transform, data, names


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, fold the layer in, and save the model and what was spent."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--images", type=Path, help="one folder of images for each class")
    made.add_argument("--model", default=SMALL, help="a timm name with arguments")
    made.add_argument("--checkpoint", type=Path, help="weights of the backbone")
    made.add_argument("--epsilon", type=float, default=2.0)
    made.add_argument("--epochs", type=int, default=10)
    made.add_argument("--batches", type=int, default=10, help="steps in an epoch")
    made.add_argument("--rate", type=float, default=4.0)
    made.add_argument("--out", type=Path, default=Path("runs/head"))
    options = made.parse_args(arguments)

    backbone, transform, data, names = opened(options.model, options.checkpoint, options.images)
    vectors, labels = features(backbone, DataLoader(data, 50))

    photos = torch.stack([transform(photo) for photo in sample_photos().values()])
    public, _ = features(backbone, [(photos, torch.zeros(len(photos)))])
    centre = public.mean(0)
    scale = LENGTH / (public - centre).norm(dim=1).mean()

    layer = nn.Linear(vectors.shape[1], len(names))
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    private = vg.DifferentialPrivacy(
        epsilon=options.epsilon, epochs=options.epochs, delta=min(1e-5, 0.5 / len(labels))
    )
    optimizer, loader, ledger = private.prepare(
        layer,
        torch.optim.SGD(layer.parameters(), lr=options.rate, momentum=0.9),
        DataLoader(
            TensorDataset((vectors - centre) * scale, labels), -(-len(labels) // options.batches)
        ),
        Draws(),
    )
    weights: list[Tensor] = []  # of the second half, whose average is less noisy
    for epoch in range(options.epochs):
        for inputs, targets in loader:
            F.cross_entropy(layer(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            if epoch >= options.epochs // 2:
                weights.append(torch.cat((layer.weight, layer.bias[:, None]), 1).detach().clone())
    average = torch.stack(weights).mean(0)

    model = built(options.model, len(names))
    model.load_state_dict(backbone.state_dict(), strict=False)
    with torch.no_grad():
        model.head.weight.copy_(average[:, :-1] * scale)
        model.head.bias.copy_(average[:, -1] - model.head.weight @ centre)
        right = (model.head(vectors).argmax(1) == labels).double().mean()
    spent = private.privacy_spent(ledger)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), options.out / "model.pt")
    told = {"epsilon": spent.epsilon, "delta": spent.delta, "steps": spent.steps, "classes": names}
    (options.out / "privacy.json").write_text(json.dumps(told, indent=2) + "\n")
    print(f"{float(right):.1%} of {len(labels)} training images right; {spent}")


if __name__ == "__main__":
    main()
