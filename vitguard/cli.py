"""The command line: `vitguard audit | plan | list`. It imports nothing heavy before it must."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from vitguard import __version__
from vitguard.errors import VitguardError, expected

__all__ = ["main"]

DEFAULT_DEFENSES = (
    "positions:kind=frozen",
    "positions:kind=sincos",
    "withheld",
    "noise:scale=0.01",
)
DEFAULT_REPORT = "vitguard-report.html"
DEFAULT_BUDGET = 50.0
"""Seconds of climbing that a run without --attack shares among its updates."""
_INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        print(f"vitguard: error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code (see `vitguard audit --help`)."""
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.prog += f" {options.command}"
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return options.run(options)
    except VitguardError as error:
        print(f"vitguard: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        print("vitguard: interrupted; nothing was written", file=sys.stderr)
        return _INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="vitguard",
        description="Attack what a client shares when it trains a Vision Transformer, and say "
        "honestly which defenses hold.",
    )
    parser.add_argument("--version", action="version", version=f"vitguard {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    _add_audit(commands)
    _add_plan(commands)
    listing = commands.add_parser("list", help="defenses and attacks with their settings")
    listing.add_argument("--json", action="store_true", help="as JSON")
    listing.set_defaults(run=_list, command="list")
    return parser


def _add_audit(commands: Any) -> None:
    audit = commands.add_parser(
        "audit",
        help="attack updates with and without defenses, beside an undefended control",
        description="Without arguments: a randomly initialised vit_base_patch16_224 on sample "
        "photos, the default defenses, the ladder of exact attacks within a time budget.",
        epilog="Class folders with numeric names are class indices, others count in sorted order. "
        "Exit codes: 0 done; 1 a defended configuration exceeds --max-psnr or --max-gain, or leaks "
        "in a way that no dB limit sees; 2 usage or input error; 3 a gate was asked for and no "
        "attack was conclusive; 130 interrupted, with the report written.",
    )
    add = audit.add_argument
    add(
        "--model",
        default="vit_base_patch16_224",
        metavar="NAME[:key=value,...]",
        help="timm name with constructor arguments, or april_vit",
    )
    weights = audit.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", metavar="FILE", help="safetensors or torch state dict")
    weights.add_argument("--pretrained", action="store_true", help="timm's weights")
    add("--mean", metavar="R,G,B", help="normalisation; the model's own by default")
    add("--std", metavar="R,G,B")
    add("--images", nargs="+", metavar="DIR|FILE", help="files, a folder or class folders")
    add(
        "--num-images",
        type=int,
        metavar="K",
        help="images to audit (sample photos: 2; a folder: 4 or one batch)",
    )
    add("--batch-size", type=int, metavar="B", help="images behind one update (1)")
    add(
        "--defense",
        action="append",
        metavar="SPEC",
        help="name[:key=value,...], stacked with +; may be repeated; none is always run",
    )
    add(
        "--attack",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="attacks, or closed-form, ladder (every exact attack), matching, input, all; "
        "settings as in ladder:seconds=60",
    )
    add(
        "--parameters",
        metavar="SELECT",
        help="what matching attacks match: attention, mlp, "
        "patch, position, all or a regular expression",
    )
    add(
        "--withhold",
        action="append",
        default=[],
        metavar="SELECT",
        help="parameters that are never sent; may be repeated",
    )
    add("--iterations", type=int, metavar="N", help="iterations of iterative attacks")
    add("--seed", type=int, default=0, metavar="S")
    add("--device", default="cpu", metavar="D", help="cpu, cuda, cuda:1, mps")
    add("--workers", type=int, default=1, metavar="W", help="threads over configurations")
    add("--update", choices=("gradient", "difference"), default="gradient")
    add("--local-steps", type=int, default=1, metavar="E")
    add("--lr", type=float, metavar="LR", help="learning rate of a difference")
    add("--optimizer", default="sgd", metavar="NAME", help="sgd or adamw")
    add(
        "--update-file", metavar="FILE", help="audit a client's saved update; --images is its truth"
    )
    add("--json", metavar="FILE|-")
    add("--html", metavar="FILE", help=f"default without --json: {DEFAULT_REPORT}")
    add("--tensorboard", metavar="DIR")
    add("--max-psnr", type=float, metavar="DB", help="gate: matched-patch PSNR")
    add("--max-gain", type=float, metavar="DB", help="gate: dB above the no-information baseline")
    audit.set_defaults(run=_audit, command="audit")


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan", help="which closed forms remain if only some parameters are encrypted, and the cost"
    )
    plan.add_argument("--model", default="vit_base_patch16_224", metavar="NAME[:key=value,...]")
    plan.add_argument(
        "--encrypt",
        action="append",
        required=True,
        metavar="SELECT",
        help="attention, mlp, patch, position, embedding, head, all, plan (the least that ends the "
        "known attacks) or a regular expression; may be repeated",
    )
    plan.add_argument(
        "--positions",
        default="learnable",
        metavar="KIND",
        help="learnable, frozen, random, sincos, none or withheld",
    )
    plan.add_argument(
        "--preset",
        default="quantised",
        metavar="NAME",
        help="of the encryption: quantised, many (clients), precise or compact",
    )
    plan.add_argument("--json", metavar="FILE|-")
    plan.set_defaults(run=_plan, command="plan")


def _audit(options: argparse.Namespace) -> int:
    from vitguard._files import check_writable

    _check_options(options)
    html = options.html or (None if options.json else DEFAULT_REPORT)
    for path in (html, None if options.json == "-" else options.json):
        if path:
            check_writable(path)
    if options.tensorboard:
        from vitguard.tracking import check_writable_folder

        check_writable_folder(options.tensorboard)
    report = _run_audit(options)
    _print_report(report, to_error=options.json == "-")
    if options.json:
        _write_json(report.to_json_text(), options.json)
    if html:
        report.save(html)
        print(f"Report: {html}", file=sys.stderr)
    if options.tensorboard:
        report.to_tensorboard(options.tensorboard)
    if code := report.gate(options.max_psnr, options.max_gain):
        _say_why(report, options)
    elif report.interrupted:
        code = _INTERRUPTED
    return code


def _say_why(report: Any, options: argparse.Namespace) -> None:
    """Print what kept the report from passing its gate."""
    from vitguard.errors import LeakFound

    try:
        report.raise_if_leaks(options.max_psnr, options.max_gain)
    except LeakFound as found:
        print(f"vitguard: gate: {' '.join(str(found).split())}", file=sys.stderr)


def _check_options(options: argparse.Namespace) -> None:
    if options.update_file:
        for name in ("num_images", "batch_size"):
            if getattr(options, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise expected("--update-file, which says how many images are behind it", flag)
    options.batch_size = 1 if options.batch_size is None else options.batch_size
    for name in ("max_psnr", "max_gain"):
        if (limit := getattr(options, name)) is not None and not math.isfinite(limit):
            raise expected(f"--{name.replace('_', '-')} as a finite number of dB", limit)
    for name in ("num_images", "batch_size", "workers", "local_steps", "iterations"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise expected(f"--{name.replace('_', '-')} of at least 1", value)
    if options.update == "difference" and options.lr is None:
        raise expected("--lr with --update difference", "none")
    if options.update == "gradient" and (options.lr is not None or options.local_steps > 1):
        raise expected("--update difference with --lr or --local-steps", "--update gradient")
    if options.lr is not None and not 0 < options.lr < float("inf"):
        raise expected("--lr above 0", options.lr)
    if options.optimizer not in ("sgd", "adamw"):
        raise expected("--optimizer sgd or adamw", repr(options.optimizer))
    if bool(options.mean) != bool(options.std):
        raise expected("--mean and --std together", "one of them")
    if options.html and not options.html.endswith(".html"):
        raise expected("--html FILE ending in .html", repr(options.html))


def _run_audit(options: argparse.Namespace) -> Any:
    from vitguard import data
    from vitguard.audit import LocalTraining, audit
    from vitguard.core import Update
    from vitguard.models import (
        build_model,
        check_finite,
        find_device,
        load_checkpoint,
        normalization_of,
    )
    from vitguard.received import audit_update
    from vitguard.registry import parse_stack
    from vitguard.vit import Anatomy

    specs = options.defense or (() if options.update_file else DEFAULT_DEFENSES)
    stacks = {spec.strip(): parse_stack(spec) for spec in specs}
    attacks = _attacks(options)
    model = build_model(options.model, pretrained=options.pretrained, seed=options.seed)
    weights = "pretrained" if options.pretrained else "random initialisation"
    if options.checkpoint:
        load_checkpoint(model, options.checkpoint)
        weights = f"checkpoint {options.checkpoint}"
    check_finite(model)
    anatomy = Anatomy.of(model)
    if not anatomy.classes:
        raise expected("a model with a classification head", options.model, "Add num_classes=...")
    if anatomy.channels != 3:
        raise expected("a model that takes 3 channels", anatomy.channels)
    normalization = normalization_of(model)
    if options.mean:
        normalization = dataclasses.replace(
            normalization, mean=_triple(options.mean, "--mean"), std=_triple(options.std, "--std")
        )
    for selector in options.withhold:
        anatomy.select(selector, [n for n, _ in model.named_parameters()])
    model = model.to(find_device(options.device))
    common: dict[str, Any] = {
        "attacks": attacks, "normalization": normalization, "withhold": options.withhold,
        "model_name": options.model, "weights": weights, "seed": options.seed,
    }  # fmt: skip
    if options.update_file:
        update = Update.load(options.update_file)
        if len(stacks) > 1:
            raise expected("one --defense, what the client ran", f"{len(stacks)}")
        truth = names = None
        if options.images:
            if (given := data.count_images(options.images)) != update.batch_size:
                raise expected(
                    f"--images with the {update.batch_size} images behind the update, in order",
                    f"{given}",
                )
            images = data.load_images(
                options.images, anatomy.image_size, min_size=anatomy.patch_size
            )
            truth, names = images.pixels, images.names
        stack = next(iter(stacks.values()), [])
        return audit_update(model, update, defenses=stack, truth=truth, names=names, **common)
    images, labels, notes = _images(options, anatomy)
    if not options.attack:
        control_and_stacks = 1 + sum(map(bool, stacks.values())) + bool(options.withhold)
        common["attacks"], note = _budgeted(control_and_stacks * len(images) // options.batch_size)
        notes.append(note)
    training = LocalTraining(options.lr, options.local_steps, options.optimizer)
    with _Progress() as progress:
        return audit(
            model, (images.pixels, labels), defenses=stacks, batch_size=options.batch_size,
            training=training, names=images.names, notes=notes, workers=options.workers,
            progress=progress, **common,
        )  # fmt: skip


def _attacks(options: argparse.Namespace) -> list[Any]:
    from vitguard.registry import parse_attacks

    attacks: list[Any] = []
    fast = options.device.partition(":")[0] == "cpu" and options.iterations is None
    chosen: list[Any] = parse_attacks(options.attack or ["ladder"], fast=fast)
    for attack in chosen:
        fields = {f.name for f in dataclasses.fields(attack)}
        changes = {
            name: getattr(options, name)
            for name in ("iterations", "parameters")
            if getattr(options, name) is not None and name in fields
        }
        attacks.append(dataclasses.replace(attack, **changes))
    for name in ("iterations", "parameters"):
        if getattr(options, name) is not None and not any(hasattr(a, name) for a in attacks):
            raise expected(
                f"--attack with one that has {name} beside --{name}",
                ", ".join(dict.fromkeys(a.name for a in attacks)), "Add --attack matching.",
            )  # fmt: skip
    return attacks


def _budgeted(updates: int) -> tuple[list[Any], str]:
    """Return the ladder with a share of the default budget, and what a reader must know of it."""
    from vitguard.attacks.ladder import Ladder

    seconds = round(min(max(DEFAULT_BUDGET / updates, 5.0), Ladder().seconds))
    note = (
        f"the ladder had {seconds} s for each update; a longer climb may find more: "
        f"--attack ladder:seconds={int(4 * seconds)}"
    )
    return [Ladder(seconds=seconds)], note


def _images(options: argparse.Namespace, anatomy: Any) -> tuple[Any, Any, list[str]]:
    from vitguard import data

    size, batch = anatomy.image_size, options.batch_size
    if options.images:
        count = options.num_images
        found = data.count_images(options.images)
        if count is None and len(options.images) == 1:
            count = min(max(4, batch), found)
        images = data.load_images(
            options.images, size, count=count, classes=anatomy.classes,
            min_size=anatomy.patch_size,
        )  # fmt: skip
    else:
        images = data.sample_images(
            size, count=options.num_images or max(2, batch), classes=anatomy.classes
        )
        found = len(images)
    notes = list(images.notes)
    if options.num_images is None and found > len(images):
        notes.append(f"the first {len(images)} of {found} images; --num-images {found} takes all")
    if len(images) < batch:
        raise expected(f"at least {batch} images for one batch", len(images))
    if extra := len(images) % batch:
        kept = len(images) - extra
        notes.append(f"{extra} images that fill no batch of {batch} were left out")
        images = dataclasses.replace(
            images, names=images.names[:kept], pixels=images.pixels[:kept],
            labels=None if images.labels is None else images.labels[:kept],
        )  # fmt: skip
    return images, images.labels, notes


def _triple(text: str, flag: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3:
        raise expected(f"{flag} as three numbers R,G,B", repr(text))
    return values


class _Progress:
    """A progress bar on standard error, gone when it is done."""

    def __enter__(self) -> _Progress:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._bar.start()
        self._task = self._bar.add_task("undefended control", total=None)
        return self

    def __call__(self, done: int, total: int, what: str) -> None:
        self._bar.update(self._task, completed=done, total=total, description=what)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _print_report(report: Any, *, to_error: bool) -> None:
    from rich.console import Console

    report.print_to(Console(stderr=to_error))


def _write_json(text: str, path: str) -> None:
    from vitguard._files import write_atomically

    if path == "-":
        print(text)
    else:
        write_atomically(path, text)


def _plan(options: argparse.Namespace) -> int:
    from rich.console import Console

    from vitguard._files import check_writable
    from vitguard.plan import plan_report

    if options.json and options.json != "-":
        check_writable(options.json)
    report = plan_report(
        options.model, options.encrypt, preset=options.preset, positions=options.positions
    )
    if options.json:
        _write_json(json.dumps(report.to_json(), indent=2, allow_nan=False), options.json)
    if options.json != "-":
        report.print_to(Console())
    return 0


def _list(options: argparse.Namespace) -> int:
    from vitguard.registry import attack_types, defense_types

    def describe(cls: Any) -> dict[str, Any]:
        settings = {
            f.name: None if f.default is dataclasses.MISSING else f.default
            for f in dataclasses.fields(cls)
        }
        summary = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
        return {"name": cls.name, "summary": summary, "settings": settings}

    defenses = [describe(cls) for cls in defense_types().values()]
    attacks = [{**describe(cls), "family": cls.family} for cls in attack_types().values()]
    if options.json:
        print(
            json.dumps(
                {"schema": 1, "defenses": defenses, "attacks": attacks}, indent=2, default=str
            )
        )
        return 0
    width = min(shutil.get_terminal_size().columns, 100)
    for title, entries in (("Defenses", defenses), ("Attacks", attacks)):
        print(title)
        for entry in entries:
            family = f" ({entry['family']})" if "family" in entry else ""
            said = f"{entry['name']}{family}: {entry['summary']}"
            settings = ", ".join(f"{k}={v}" for k, v in entry["settings"].items())
            for text, space in ((said, "  "), (settings, "    ")):
                if text:
                    print(_folded(text, width, space))
    return 0


def _folded(text: str, width: int, space: str) -> str:
    return textwrap.fill(
        text, width, initial_indent=space, subsequent_indent=f"{space}  ",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
