"""Model, data and training, as in any Flower app; `protected` is what vitguard adds."""

import os
from io import BytesIO
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import vitguard as vg

EXAMPLES = 64  # of each client


def make_model():
    """Return a small Vision Transformer for 32 x 32 images."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes)


def protected(model, *update_defenses):
    """Return the guard of a model with fixed positions, shuffled patches, and more."""
    stack = [vg.FixedPositions("sincos"), vg.PatchShuffle(ratio=0.5), *update_defenses]
    return vg.protect(model, stack)


def load_data(partition: int):
    """Return a client's own part of CIFAR-10, or random images where it is not there."""
    file = Path(os.environ.get("VITGUARD_DATA", "")) / "cifar10.npz"
    if file.is_file():
        images, labels = _cifar10(file, range(partition * EXAMPLES, (partition + 1) * EXAMPLES))
    else:
        generator = torch.Generator().manual_seed(partition)
        images = torch.randn(EXAMPLES, 3, 32, 32, generator=generator)
        labels = torch.randint(10, (EXAMPLES,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=16)


def _cifar10(file: Path, places: range):
    """Read images that lie in the file as JPEG, one after the other."""
    with np.load(file) as stored:
        joined, starts, labels = stored["train_jpeg"], stored["train_off"], stored["train_y"]
    files = (BytesIO(joined[starts[i] : starts[i + 1]].tobytes()) for i in places)
    pixels = np.stack([np.asarray(Image.open(f).convert("RGB")) for f in files])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images, torch.from_numpy(labels[places.start : places.stop])


def train(model, loader, epochs: int, lr: float) -> float:
    """Train in place and return the mean loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    losses = []
    model.train()
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return float(np.mean(losses))
