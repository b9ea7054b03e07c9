"""Honest checkpoints of many kinds, each with a batch of images: what must not be suspicious."""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import vitguard as vg
from vitguard.federated.local import LocalClient, LocalFederation
from vitguard.inspection import Memory, weights_of
from vitguard.models import load_checkpoint
from vitguard.vit import Anatomy

__all__ = ["Checkpoint", "cifar", "checkpoints", "photos", "tiny", "victims"]

SIZES = (1, 2, 4, 8, 16)


@dataclass
class Checkpoint:
    """A model as it arrives at a client, the client's batch and what the client remembers.

    `run` names the training or the draw that it comes from: limits are chosen on some runs and
    judged on others.
    """

    kind: str
    run: int
    model: nn.Module
    images: Tensor
    labels: Tensor
    memory: Memory


def cifar(count: int = 512, start: int = 0, size: int = 32) -> tuple[Tensor, Tensor]:
    """Return CIFAR-10 images as model input in about [-2, 2], and labels."""
    with np.load(Path(os.environ["VITGUARD_DATA"]) / "cifar10.npz") as pack:
        data, ends, labels = pack["train_jpeg"], pack["train_off"], pack["train_y"]
    files = [data[ends[i] : ends[i + 1]].tobytes() for i in range(start, start + count)]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(f)).convert("RGB")) for f in files])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.247, 0.2435, 0.2616])
    images = (images - mean[:, None, None]) / std[:, None, None]
    if size != 32:
        images = F.interpolate(images, (size, size), mode="bicubic")
    return images, torch.from_numpy(labels[start : start + count]).long()


def photos(count: int, size: int, seed: int) -> Tensor:
    """Return photos as model input."""
    files = sorted((Path(os.environ["VITGUARD_DATA"]) / "photos").glob("*.jpg"))
    chosen = [files[(seed * 17 + i * 7) % len(files)] for i in range(count)]
    images = [Image.open(f).convert("RGB").resize((size, size)) for f in chosen]
    pixels = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1).float() for i in images])
    return pixels / 127.5 - 1


def tiny(seed: int, **more: object) -> nn.Module:
    """Return a small ViT for 32 x 32 images."""
    torch.manual_seed(seed)
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 3, "num_heads": 4}
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **{**sizes, **more})


def trained(name: str) -> nn.Module:
    """Return one of the two CIFAR-10 ViTs that others trained."""
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=4, embed_dim=128, depth=4, num_heads=4, mlp_ratio=2, num_classes=10
    )
    weights = Path(os.environ["VITGUARD_DATA"]) / f"weights/cifar10_vit_{name}.safetensors"
    load_checkpoint(model, weights)
    return model


def dinov2(size: int, seed: int) -> nn.Module:
    """Return DINOv2-small with a fresh head, for images of another size."""
    torch.manual_seed(seed)
    model = timm.create_model("vit_small_patch14_dinov2", img_size=size, num_classes=10)
    weights = "weights/dinov2_small_timm_fp16.safetensors"
    from safetensors.torch import load_file

    state = load_file(Path(os.environ["VITGUARD_DATA"]) / weights)
    state = {n: t.float() for n, t in state.items()}
    grid = [size // 14] * 2
    state["pos_embed"] = timm.layers.resample_abs_pos_embed(state["pos_embed"], grid)
    model.load_state_dict(state, strict=False)
    return model


def checkpoints(half: int = 0) -> Iterator[Checkpoint]:
    """Yield every honest checkpoint; the model of one may be the next one's, moved on.

    Args:
        half: 0 for those that limits are chosen on, 1 for those that judge them: other draws of the
            weights, other images, other runs.
    """
    yield from _random(half)
    yield from _training_runs(half)
    yield from _pretrained(half)
    yield from _dino(half)
    yield from _private(half)
    yield from _federated(half)


def victims() -> Iterator[tuple[str, nn.Module, Tensor, Tensor]]:
    """Yield models that a server may craft, each in training mode with four images."""
    for name, make, size in _architectures():
        torch.manual_seed(11)
        yield f"random {name}", make().train(), photos(4, size, 5), torch.arange(4)
    data = cifar(start=30000)
    for name in "ab":
        yield f"CIFAR ViT {name}", trained(name).train(), *_draw(*data, 0, 4)
    model = tiny(91)
    _steps(model, data, torch.optim.AdamW(model.parameters(), 1e-3), 60, 32, 91)
    yield "trained from scratch", model, *_draw(*data, 1, 4)
    yield "DINOv2-small", dinov2(56, 91).train(), photos(4, 56, 9), torch.arange(4)


def _draw(images: Tensor, labels: Tensor, seed: int, size: int | None = None) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    count = size or SIZES[seed % len(SIZES)]
    chosen = torch.randperm(len(images), generator=generator)[:count]
    return images[chosen], labels[chosen]


def _random(half: int) -> Iterator[Checkpoint]:
    for i, (name, make, size) in enumerate(_architectures()):
        for seed in range(8):
            torch.manual_seed(7000 * half + 100 * i + seed)
            count = SIZES[(i + seed) % len(SIZES)] if size <= 112 else 1
            images = photos(count, size, seed + 40 * half)
            labels = torch.arange(count) % 10
            yield Checkpoint(f"random {name}", seed, make(), images, labels, Memory())


def _architectures() -> list:
    from torchvision.models import VisionTransformer
    from transformers import ViTConfig, ViTForImageClassification

    def of_timm(name: str, size: int, **more: object):
        def make() -> nn.Module:
            return timm.create_model(name, num_classes=10, img_size=size, **more)

        return (name, make, size)

    def of_torchvision() -> nn.Module:
        return VisionTransformer(
            image_size=64, patch_size=8, num_layers=4, num_heads=4, hidden_dim=128, mlp_dim=512,
            num_classes=10,
        )  # fmt: skip

    def of_transformers() -> nn.Module:
        config = ViTConfig(
            hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512,
            image_size=64, patch_size=8, num_labels=10,
        )  # fmt: skip
        return ViTForImageClassification(config)

    return [
        of_timm("vit_tiny_patch16_224", 32, patch_size=4, embed_dim=48, depth=2, num_heads=3),
        of_timm("vit_tiny_patch16_224", 64),
        of_timm("vit_tiny_patch16_224", 96, patch_size=8, depth=4),
        of_timm("vit_small_patch16_224", 112),
        of_timm("vit_small_patch14_dinov2", 112, depth=4),  # LayerScale
        of_timm("vit_small_patch14_reg4_dinov2", 56, depth=4),  # registers
        of_timm("deit_tiny_distilled_patch16_224", 64, depth=6),
        of_timm("vit_base_patch16_224", 64, depth=4),
        of_timm("vit_base_patch32_224", 96, depth=4),
        of_timm("vit_tiny_patch16_224", 64, global_pool="avg", class_token=False, depth=6),
        of_timm("vit_tiny_patch16_224", 64, weight_init="jax", depth=6),
        of_timm("vit_tiny_patch16_224", 64, init_values=1e-5, depth=6),
        ("torchvision", of_torchvision, 64),
        ("transformers", of_transformers, 64),
    ]


def _steps(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    optimizer: torch.optim.Optimizer,
    steps: int,
    batch: int,
    seed: int,
) -> None:
    model.train()
    for i in range(steps):
        images, labels = _draw(*data, seed * 1000 + i, batch)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


def _accept(memory: Memory, model: nn.Module) -> None:
    memory.accept(memory.traces(weights_of(model), Anatomy.of(model)))


def _training_runs(half: int) -> Iterator[Checkpoint]:
    """Runs from scratch: a checkpoint every few steps, the last of one of them overfitted."""
    data = cifar(start=12000 * half)
    for run in range(6):
        few = (data[0][:64], data[1][:64]) if run in (2, 3) else data
        model, memory = tiny(run + 70 * half, global_pool="avg" if run % 2 else "token"), Memory()
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        if run == 3:
            optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        for epoch in range(30):
            kind = "overfitted" if run in (2, 3) else "trained from scratch"
            yield Checkpoint(kind, run, model, *_draw(*data, 31 * run + epoch), memory)
            _accept(memory, model)
            _steps(model, few, optimizer, (12, 1)[run > 3], 32, 100 * run + epoch + 50 * half)


def _pretrained(half: int) -> Iterator[Checkpoint]:
    data = cifar(start=2000 + 12000 * half)
    for run, name in enumerate(("a", "b", "a", "b")):
        model, memory = trained(name), Memory()
        rate = 1e-3 if run < 2 else 1e-4
        optimizer = torch.optim.AdamW(model.parameters(), rate)
        for epoch in range(14):
            yield Checkpoint(f"CIFAR ViT {name}", run, model, *_draw(*data, run + epoch), memory)
            _accept(memory, model)
            _steps(model, data, optimizer, 4, 16, 200 + 10 * run + epoch + 500 * half)


def _dino(half: int) -> Iterator[Checkpoint]:
    for run in range(4):
        size = (112, 56)[run % 2]
        model, memory = dinov2(size, run + 70 * half), Memory()
        if run >= 2:  # rounded to half precision, as it was stored
            model = model.half().float()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
        for epoch in range(6):
            count = (4, 1, 2, 8, 3, 4)[epoch]
            images, labels = photos(count, size, 10 * run + epoch + 400 * half), torch.arange(count)
            yield Checkpoint("DINOv2-small", run, model, images, labels, memory)
            _accept(memory, model)
            _steps(
                model, (photos(4, size, run + 400 * half), torch.arange(4)), optimizer, 2, 4, epoch
            )


def _private(half: int) -> Iterator[Checkpoint]:
    """Rounds whose updates carry the noise of client-level privacy."""
    data = cifar(start=4000 + 12000 * half)
    for run in range(3):
        model = trained("ab"[run % 2]) if run < 2 else tiny(40 + run + 70 * half)
        memory = Memory()
        noise = vg.ClientPrivacy(clip=1.0, noise=(0.3, 1.0, 0.6)[run])
        guard = vg.protect(copy.deepcopy(model), [noise])
        for number in range(20):
            yield Checkpoint("after DP rounds", run, model, *_draw(*data, run + number), memory)
            _accept(memory, model)
            guard.model.load_state_dict(model.state_dict(), strict=False)
            updates = [
                guard.update(*_draw(*data, 7 * number + k, 16), learning_rate=0.05, local_steps=2)
                for k in range(2)
            ]
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p += sum(u.tensors[name] for u in updates) / (2 * 20)  # of many more clients


def _federated(half: int) -> Iterator[Checkpoint]:
    """FedAvg of three clients with other classes each."""
    images, labels = cifar(start=6000 + 12000 * half)
    training = vg.LocalTraining
    for run in range(3):
        clients = {}
        for k in range(3):
            mine = (labels % 3 == k).nonzero()[:16, 0]
            pixels = (images[mine] * 0.25 + 0.48).clamp(0, 1)
            clients[f"client {k}"] = LocalClient(pixels, labels[mine])
        model, memory = tiny(50 + run + 70 * half), Memory()
        how = training(1e-3, 3, "adamw") if run < 2 else training(0.1, 3, momentum=0.9)
        federation = LocalFederation(model, clients, training=how)
        for number in range(25):
            state = model.state_dict()
            model.load_state_dict({**state, **federation.weights})
            batch = _draw(images, labels, run + number)
            yield Checkpoint("after FedAvg rounds", run, model, *batch, memory)
            _accept(memory, model)
            federation.round()
