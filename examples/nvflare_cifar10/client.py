"""NVFlare's client script. It knows nothing of vitguard: the job's filters seal what it sends."""

from __future__ import annotations

import argparse
import io
import os
from pathlib import Path

import numpy as np
import nvflare.client as flare
import torch
import torch.nn.functional as F
from model import tiny_vit
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from PIL import Image


def images_of(site: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this site's share of CIFAR-10, or drawn images where there is no file."""
    number = int(site.rsplit("-", 1)[1])
    path = Path(os.environ.get("VITGUARD_DATA", "")) / "cifar10.npz"
    if path.is_file():
        with np.load(path) as stored:
            files, ends, classes = stored["train_jpeg"], stored["train_off"], stored["train_y"]
        mine = range(number - 1, len(classes), 3)[:64]
        pictures = [Image.open(io.BytesIO(files[ends[i] : ends[i + 1]].tobytes())) for i in mine]
        pixels = np.stack([np.asarray(p.convert("RGB").resize((32, 32))) for p in pictures])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        return images, torch.from_numpy(classes[list(mine)]).long()
    generator = torch.Generator().manual_seed(number)
    labels = torch.randint(0, 10, (64,), generator=generator)
    images = torch.randn(64, 3, 32, 32, generator=generator) * 0.5
    return images + labels[:, None, None, None] / 10, labels


def photo_of(site: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one sample photo, each site another, for `curious_server.py`."""
    from vitguard import data

    number = int(site.rsplit("-", 1)[1])
    pixels = data.sample_images((32, 32), count=number).pixels[number - 1 :]
    return pixels * 2 - 1, torch.tensor([number])


def main() -> None:
    """Train when a task comes; send the weight difference and the number of images."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--record", default="", help="folder for plain differences, for the check")
    parser.add_argument("--photo", action="store_true", help="one step on one sample photo")
    options = parser.parse_args()
    record = options.record
    flare.init()
    site = flare.get_site_name()
    images, labels = photo_of(site) if options.photo else images_of(site)
    images, labels = images[: 16 * int(site[-1])], labels[: 16 * int(site[-1])]
    model = tiny_vit()
    while flare.is_running():
        task = flare.receive()
        if task is None:
            break
        before = {name: torch.as_tensor(value) for name, value in task.params.items()}
        model.load_state_dict(before)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(1 if options.photo else 2):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
        difference = {n: t.detach() - before[n] for n, t in model.state_dict().items()}
        if record:  # on one machine, to compare with the sum of plain differences
            kept = {"before": before, "difference": difference, "weight": len(labels)}
            torch.save(kept, Path(record) / f"{site}-{task.current_round}.pt")
        flare.send(
            FLModel(
                params=difference,
                params_type=ParamsType.DIFF,
                metrics={"loss": loss.item()},
                meta={"NUM_STEPS_CURRENT_ROUND": len(labels)},
            )
        )


if __name__ == "__main__":
    main()
