"""Model, data and training, as in any Flower app; `protected` and `prepare` are vitguard's."""

import os
from functools import lru_cache
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


def make_model(seed: int = 0):
    """Return a small Vision Transformer for 32 x 32 images, as `seed` draws it."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes)


def protected(model, config, sealing=None):
    """Return the guard of a model under the defenses that the run's configuration names.

    Args:
        sealing: Makes the client's encryptor or masker; the server, and an evaluation, have none.
    """
    rounds, epochs = int(config["num-server-rounds"]), int(config["local-epochs"])
    stack = [vg.InspectWeights(), vg.FixedPositions("sincos"), vg.PatchShuffle(ratio=0.5)]
    match config["variant"]:
        case "encrypted":
            stack.append(vg.EncryptedGradients(encryptor=sealing and sealing()))
        case "masks":
            stack.append(vg.MaskedAggregation(client=sealing and sealing()))
        case "private":  # for each client
            stack.append(vg.ClientPrivacy(epsilon=8.0, rounds=rounds))
        case "records":  # for each image of a client
            stack.append(vg.DifferentialPrivacy(epsilon=8.0, delta=1e-3, epochs=rounds * epochs))
        case "plain":  # to compare with: the update leaves as it is
            pass
        case other:
            raise ValueError(f"Expected encrypted, masks, private, records, plain; got {other}.")
    return vg.protect(model, stack)


@lru_cache
def load_data(partition: int):
    """Return a client's own images for training and for evaluation.

    They are parts of CIFAR-10, or random where it is not there.
    """
    file = Path(os.environ.get("VITGUARD_DATA", "")) / "cifar10.npz"
    start, count = 2 * EXAMPLES * partition, 2 * EXAMPLES
    if file.is_file():
        images, labels = _cifar10(file, range(start, start + count))
    else:
        generator = torch.Generator().manual_seed(partition)
        images = torch.randn(count, 3, 32, 32, generator=generator)
        labels = torch.randint(10, (count,), generator=generator)
    parts = [TensorDataset(images[k::2], labels[k::2]) for k in range(2)]
    return [DataLoader(part, batch_size=16) for part in parts]


def _cifar10(file: Path, places: range):
    """Read images that lie in the file as JPEG, one after the other."""
    with np.load(file) as stored:
        joined, starts, labels = stored["train_jpeg"], stored["train_off"], stored["train_y"]
    files = (BytesIO(joined[starts[i] : starts[i + 1]].tobytes()) for i in places)
    pixels = np.stack([np.asarray(Image.open(f).convert("RGB")) for f in files])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images, torch.from_numpy(labels[places.start : places.stop])


def train(model, guard, loader, config) -> float:
    """Train in place and return the mean loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=float(config["lr"]))
    optimizer, loader = guard.prepare(optimizer, loader)
    losses = []
    model.train()
    for _ in range(int(config["local-epochs"])):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return float(np.mean(losses))


@torch.no_grad()
def accuracy(model, loader) -> float:
    """Return the share of images whose class is found."""
    model.eval()
    right = [(model(images).argmax(1) == labels).float() for images, labels in loader]
    return float(torch.cat(right).mean())
