"""What a malicious server reads: share of patches and seconds, one row for each batch or sum.

    python benchmarks/malicious.py [--images DIR] [--craft SPEC] [--only ROW ...] [--picture FILE]
    python benchmarks/malicious.py --train adapters:r=64 lora:r=16 lora-fc1:r=16 --only 1 4

ViT-B/16 with random weights as the server found them, photos, float32. A row is the images of one
client, or `clients x images` for the plain average of several clients' gradients. A patch counts
where a guessed patch at its position comes within 40 or 60 dB. `multiples` are the CPU seconds of
reading the gradient over those of one forward and backward pass of the same images. `honest` is
what `ladder` verifies of the same batch with honest weights (`--ladder`; minutes a row).
With `--train` clients train that and the head alone: adapters behind each MLP (`adapters`),
beside it (`beside`) or behind the attention (`attention`), LoRA on qkv (`lora`) or on fc1
(`lora-fc1`), the last block (`last-block`).
With `--defenses` each defense is audited instead, on a small ViT (width 216, four blocks, patches
of 8 x 8) and four photos of 32 x 32 pixels, two to a batch (51 under a floor): the share of patches
that the attack proved and that are right, and of those that it came within 40 dB of. Named ones are
audited with `--craft`; without names, all with the crafts that are adapted to them, and the opened
sums of four clients with a photo each.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from peft_table import prepared
from torch import Tensor, nn

import vitguard as vg
from vitguard import data, wrapping
from vitguard.attacks.imprint import ImprintReading
from vitguard.attacks.ladder import Ladder
from vitguard.core import Guess, Normalization, Update
from vitguard.errors import VitguardError
from vitguard.federated.local import LocalClient, LocalFederation
from vitguard.guard import protect
from vitguard.models import build_model, normalization_of
from vitguard.registry import parse_stack
from vitguard.threats import CuriousServer, MaliciousServer, Threat
from vitguard.threats.crafts.channels import waves_of
from vitguard.vit import Anatomy

ROWS = ("1", "4", "16", "64", "4x4", "16x4")
_FLOOR = "batch-floor+sample-normalisation"
_QUIET = "imprint:quiet=1e4"
_FISHING = "fishing:label=0"
DEFENSES = (
    ("positions:kind=frozen", "imprint"),
    ("positions:kind=sincos", "imprint"),
    ("positions:kind=none", "imprint"),
    ("withheld", "imprint"),
    ("shuffle:ratio=0.5", "imprint"),
    ("positions:kind=sincos+shuffle:ratio=0.9", "imprint"),
    ("noise:scale=0.001", "imprint"),
    ("noise:scale=0.01", "imprint"),
    ("noise:scale=0.1", "imprint"),
    ("noise:scale=0.01", "imprint:each=3"),
    ("pruning:keep=0.1", "imprint"),
    ("pruning:keep=0.1", "imprint:each=5"),
    ("sample-normalisation", "imprint"),
    ("sample-normalisation", _FISHING),
    (_FLOOR, "imprint"),
    (_FLOOR, _FISHING),
    ("frozen-stem:trained=0", "imprint"),
    ("frozen-stem", "imprint"),
    ("frozen-stem:trained=2", "imprint"),
    (f"frozen-stem:trained=2+{_FLOOR}", "imprint"),
    (f"frozen-stem+{_FLOOR}", "imprint"),
    (f"frozen-stem+{_FLOOR}", _FISHING),
    (f"frozen-stem+{_FLOOR}+low-rank:rank=2", _FISHING),
    (f"frozen-stem+{_FLOOR}+sign-update", _FISHING),
    ("low-rank:rank=2", "imprint"),
    ("sign-update", "imprint"),
    ("sign-update", "imprint:each=1"),
    ("quantised-update:bits=8", "imprint"),
    ("quantised-update:bits=4", "imprint"),
    ("gate", "imprint"),
    ("inspect", "imprint"),
    ("inspect", _FISHING),
    ("privacy:epsilon=8.0,epochs=3", "imprint"),
    ("privacy:epsilon=8.0,epochs=3", "imprint:each=1"),
    ("client-privacy:epsilon=8.0", "imprint"),
    ("client-privacy:epsilon=8.0", "imprint:each=1"),
    ("encryption:select=plan", "imprint"),
    ("encryption:select=all", "imprint"),
)
SUMS = tuple(
    (stack, craft)
    for stack in (
        "masking",
        "encryption:preset=precise",
        "encryption:preset=many",
        "encryption:preset=quantised",
    )
    for craft in ("imprint", _QUIET)
)
SMALL = (
    "vit_tiny_patch16_224:img_size=32,patch_size=8,embed_dim=216,depth=4,num_heads=4,mlp_ratio=4,"
    "num_classes=10"
)
_MANY = 51  # images of the smallest batch that a floor of four times the width lets leave
_AT_ONCE = 4  # images of a pass: what memory allows


def main() -> None:
    """Print the table."""
    options = _options()
    if options.defenses is not None:
        return _defended(options)
    print("| images | patches >= 40 dB | >= 60 dB | median dB | multiples | honest ladder |")
    print("|---|---|---|---|---|---|", flush=True)
    for trained in options.train or [""]:
        options.trained = trained
        for row in options.only or ROWS:
            clients, _, images = row.rpartition("x")
            told = f"| {trained} " if trained else ""
            print(told + _row(options, int(clients or 1), int(images)), flush=True)


def _network(options: argparse.Namespace) -> nn.Module:
    model = build_model(options.model)
    return wrapping.bare(prepared(model, options.trained)) if options.trained else model


def _defended(options: argparse.Namespace) -> None:
    model = build_model(SMALL)
    everything = data.load_images(options.images, (32, 32), count=_MANY).pixels
    print(
        "| defense | craft | batch | verdict | proved and right | within 40 dB | best image, dB |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    chosen = [(spec, options.craft) for spec in options.defenses] or [
        ("none", "imprint"),
        *DEFENSES,
    ]
    for stack, craft in chosen:
        batch = _MANY if "batch-floor" in stack else 2
        batch = 4 if craft == _FISHING and batch == 2 else batch
        pixels = everything[: max(batch, 4)]
        labels = torch.arange(len(pixels))
        if craft == _FISHING:  # one image of the class
            labels = torch.where(labels == 0, 0, 1 + labels % 9)
        labels = labels % 10
        attack = "ladder:seconds=15" if craft == _FISHING else "imprint"
        name = f"| `{stack}` | `{craft}` | {batch} "
        try:
            report = vg.audit(
                model, (pixels, labels), defenses={stack: parse_stack(stack)}, attacks=attack,
                batch_size=batch, threat=MaliciousServer(craft),
            )  # fmt: skip
        except VitguardError as error:
            print(f"{name}| refused: {error} | | | |", flush=True)
            continue
        found = [f for f in report.findings if f.defended or stack == "none"][-1]
        near = "" if craft == _FISHING else _near(model, stack, craft, pixels, labels, batch)
        print(f"{name}{_told(found, near)}", flush=True)
    if not options.defenses:
        for stack, craft in SUMS:
            print(f"| `{stack}`, the sum | `{craft}` | 4 x 1 {_of_sum(everything, stack, craft)}")


def _told(found: vg.Finding, near: str) -> str:
    share = found.details.get("recovered")
    best = "" if found.psnr is None else f"{found.psnr.max:.1f}"
    told = "" if share is None else f"{100 * share:.1f} %"
    return f"| {found.verdict} | {told} | {near} | {best} |"


def _near(
    model: nn.Module, stack: str, craft: str, pixels: Tensor, labels: Tensor, batch: int
) -> str:
    """Return the share of patches that were guessed within 40 dB, whatever was proved."""
    threat, normalization = MaliciousServer(craft), normalization_of(model)
    close: list[Tensor] = []
    for at in torch.arange(len(pixels)).split(batch):
        secret = torch.Generator().manual_seed(int(at[0]))
        guard = protect(build_model(SMALL).train(), parse_stack(stack), generator=secret)
        guard.model.load_state_dict({**guard.model.state_dict(), **model.state_dict()})
        guard.model.load_state_dict({**guard.model.state_dict(), **threat.hand_out(guard)})
        try:
            update = guard.update(normalization.apply(pixels[at]), labels[at])
            guess = ImprintReading().run(
                threat.view(guard, update, normalization), torch.Generator()
            )
        except VitguardError:
            return ""
        close.append(_quality(Anatomy.of(model), pixels[at], guess).flatten() >= 40)
    return _share(torch.cat(close))


def _of_sum(everything: Tensor, stack: str, craft: str) -> str:
    """Return what is read of the opened sum of four clients with an image each."""
    clients = {str(i): LocalClient(everything[i : i + 1], torch.tensor([i])) for i in range(4)}
    threat = MaliciousServer(craft)
    seen = LocalFederation(
        build_model(SMALL), clients, stack, threat=threat, training=vg.LocalTraining(0.05)
    ).round()
    if seen.total is None:
        return f"| refused: {next(iter(seen.refused.values()), seen.failed)} | | | |"
    report = vg.audit(seen.total, threat=threat, attacks="imprint")
    view = threat.view(seen.total.guard, seen.total.update, seen.total.normalization)
    near = ""
    try:
        guess = ImprintReading().run(view, torch.Generator())
        near = _share(_quality(Anatomy.of(view.model), everything[:4], guess) >= 40)
    except VitguardError:
        pass
    return _told([f for f in report.findings if f.defended][-1], near)


def _row(options: argparse.Namespace, clients: int, images: int) -> str:
    model = _network(options)
    anatomy, normalization = Anatomy.of(model), normalization_of(model)
    found = data.load_images(
        options.images, anatomy.image_size, count=clients * images, classes=anatomy.classes
    )
    pixels, labels = _enough(found.pixels, clients * images), torch.arange(clients * images)
    labels = labels % anatomy.classes
    honest = "not run"
    if options.ladder:
        guess = _attacked(CuriousServer(), model, pixels, labels, normalization, clients)[0]
        honest = "nothing" if isinstance(guess, str) or guess.verified is None else (
            f"{100 * float(guess.verified.double().mean()):.1f} %"
        )  # fmt: skip
    threat = MaliciousServer(options.craft)
    model.load_state_dict(threat.hand_out(protect(_network(options), ())))
    guess, trained, read = _attacked(threat, model, pixels, labels, normalization, clients)
    if isinstance(guess, str):
        return f"| {clients} x {images} | 0 | 0 | {guess} | {read / trained:.2f} | {honest} |"
    quality = _quality(anatomy, pixels, guess)
    if anatomy.patch_pixels > anatomy.width:
        kept = waves_of(anatomy)[:, : anatomy.width - 3]
        coarse = anatomy.unpatchify(anatomy.patchify(pixels.double()) @ kept @ kept.T)
        at_it = _quality(anatomy, coarse, guess)
        print(
            f"at the resolution of {kept.shape[1]} waves: {_share(at_it >= 40)} within 40 dB, "
            f"median {float(at_it.median()):.1f} dB"
        )
    if options.picture:
        _picture(options.picture, pixels, guess)
    return (
        f"| {clients} x {images} | {_share(quality >= 40)} | {_share(quality >= 60)} "
        f"| {float(quality.median()):.1f} | {read / trained:.2f} | {honest} |"
    )


def _attacked(
    threat: Threat,
    model: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    normalization: Normalization,
    clients: int,
) -> tuple[Guess | str, float, float]:
    """Return the guess or why there is none, the CPU seconds of the passes and of the attack."""
    guard = protect(model, ())
    begun = time.process_time()
    total: dict[str, Tensor] = {}
    for client in torch.arange(len(pixels)).chunk(clients):  # each rounds its own gradient
        model.zero_grad()
        for part in client.split(_AT_ONCE):
            output = model(normalization.apply(pixels[part]))
            loss = F.cross_entropy(output, labels[part], reduction="sum") / len(client)
            loss.backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                total[name] = total.get(name, 0) + p.grad / clients
    model.zero_grad()
    trained = time.process_time() - begun
    update = Update(total, batch_size=len(pixels))
    view = threat.view(guard, update, normalization)
    begun = time.process_time()
    try:
        attack = ImprintReading() if isinstance(threat, MaliciousServer) else Ladder()
        return attack.run(view, torch.Generator()), trained, time.process_time() - begun
    except VitguardError as error:
        return str(error), trained, time.process_time() - begun
    finally:
        guard.remove()


def _quality(anatomy: Anatomy, pixels: Tensor, guess: Guess) -> Tensor:
    """Return for each true patch the PSNR of the nearest guessed patch at its position, in dB."""
    truth = anatomy.patchify(pixels.double())
    guessed = anatomy.patchify(guess.images.double())
    near = [(guessed - one).square().mean(-1).min(0).values for one in truth]
    return -10 * torch.stack(near).clamp_min(1e-20).log10()


def _enough(pixels: Tensor, count: int) -> Tensor:
    """Return as many images: where there are too few, mirrored ones, then turned ones."""
    made = torch.cat([pixels, pixels.flip(-1), pixels.flip(-2)])
    if len(made) < count:
        raise SystemExit(f"Expected {-(-count // 3)} images at least, got {len(pixels)}.")
    return made[:count]


def _share(right: Tensor) -> str:
    return f"{100 * float(right.double().mean()):.1f} %"


def _picture(path: str, pixels: Tensor, guess: Guess) -> None:
    from PIL import Image

    shown = min(len(pixels), 4)
    truth, images = pixels[:shown], guess.images
    near = [images[(images - one).square().mean((1, 2, 3)).argmin()] for one in truth.double()]
    rows = [torch.cat([*truth.double()], -1), torch.cat(near, -1)]
    grid = (torch.cat(rows, -2).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    image = Image.fromarray(grid.numpy())
    image.save(path, quality=85)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    folder = os.environ.get("VITGUARD_DATA", "")
    photos = str(Path(folder) / "photos") if folder else None
    parser.add_argument("--images", default=photos, required=photos is None)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--craft", default="imprint")
    parser.add_argument("--only", nargs="+", choices=ROWS)
    parser.add_argument("--train", nargs="+", metavar="WHAT")
    parser.add_argument("--ladder", action="store_true")
    parser.add_argument("--defenses", nargs="*", metavar="SPEC")
    parser.add_argument("--picture")
    return parser.parse_args()


if __name__ == "__main__":
    main()
