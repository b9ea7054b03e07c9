"""The command line: `vitguard audit | plan | advise | list`. It imports heavy things late."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from vitguard import __version__
from vitguard.cli import audit as audit_command
from vitguard.cli.audit_forms import DEFAULT_REPORT, INTERRUPTED
from vitguard.cli.output import console, shown, shows_what_it_can
from vitguard.errors import InputError, VitguardError, expected

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        said = " ".join(message.split())  # an argument may hold line breaks
        print(f"vitguard: error: {said} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code (see `vitguard audit --help`)."""
    parser = _parser()
    shows_what_it_can()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.prog += f" {options.command}"
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        _check_empty(options)
        code = 2 if options.command == "audit" else 0  # of a reader who leaves: no gate passes
        with shown():
            code = options.run(options)
        return code
    except VitguardError as error:
        print(f"vitguard: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vitguard: interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED


def _check_empty(options: argparse.Namespace) -> None:
    """Refuse empty values, as of a variable that is not set: no option is passed over."""
    for name, value in vars(options).items():
        if isinstance(value, str) and not value.strip():
            raise expected(f"--{name.replace('_', '-')} with a value", repr(value))


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
    _add_advise(commands)
    listing = commands.add_parser("list", help="defenses and attacks with their settings")
    listing.add_argument("--json", action="store_true", help="as JSON")
    listing.set_defaults(run=_list, command="list")
    return parser


def _add_audit(commands: Any) -> None:
    audit = commands.add_parser(
        "audit",
        help="attack updates with and without defenses, beside an undefended control",
        description="Without arguments: a randomly initialised vit_base_patch16_224 on sample "
        "photos, the default defenses, the ladder of exact attacks within a budget of work.",
        epilog="Class folders with numeric names are class indices, others count in sorted order. "
        "Exit codes: 0 done; 1 a defended configuration exceeds --max-psnr or --max-gain, or leaks "
        "in a way that no dB limit sees; 2 usage or input error; 3 a gate was asked for and no "
        "attack was conclusive, or one was cut, failed or left open; 130 interrupted, with the "
        "report written.",
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
    _add_train(add)
    add("--mean", metavar="R,G,B", help="normalisation; the model's own by default")
    add("--std", metavar="R,G,B")
    add("--images", nargs="+", metavar="DIR|FILE", help="files, a folder or class folders")
    add(
        "--num-images",
        type=int,
        metavar="K",
        help="images to audit (sample photos: 2; a folder: 4; one batch where that is more)",
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
        help="parameters that are never sent: a role, plan, a regex, a/b; may be repeated",
    )
    add(
        "--threat",
        default="curious",
        metavar="NAME",
        help="curious (honest weights), or malicious[:craft=NAME[:key=value,...]]: the server "
        "writes the weights that clients train on",
    )
    add("--iterations", type=int, metavar="N", help="iterations of iterative attacks")
    add("--seed", type=int, default=0, metavar="S")
    add("--device", default="cpu", metavar="D", help="cpu, cuda, cuda:1, mps")
    add("--workers", type=int, default=1, metavar="W", help="threads over configurations")
    add("--update", choices=("gradient", "difference"), help="what a client sends (gradient)")
    add("--local-steps", type=int, metavar="E")
    add("--lr", type=float, metavar="LR", help="learning rate of a difference")
    add("--optimizer", metavar="NAME", help="sgd, adam or adamw")
    add(
        "--update-file",
        metavar="FILE",
        help="audit what was stored of a client: an update, weights after a step (with --before), "
        "ciphertext; --images is its truth",
    )
    add("--before", metavar="FILE", help="the weights before the step of --update-file")
    add("--json", metavar="FILE|-")
    add("--html", metavar="FILE", help=f"default without --json: {DEFAULT_REPORT}")
    add("--tensorboard", metavar="DIR")
    add("--max-psnr", type=float, metavar="DB", help="gate: matched-patch PSNR")
    add("--max-gain", type=float, metavar="DB", help="gate: dB above the no-information baseline")
    audit.set_defaults(run=audit_command.run, command="audit")


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="which closed forms remain if only some parameters are trained or encrypted, and the "
        "cost",
    )
    plan.add_argument("--model", default="vit_base_patch16_224", metavar="NAME[:key=value,...]")
    plan.add_argument(
        "--train",
        action="append",
        metavar="WHAT",
        help="what is trained: all, head, last-block, lora:r=4 (on query, key, value), "
        "adapters:r=16 (beside each MLP), or a selection as of --encrypt; may be repeated, or "
        "joined by /",
    )
    plan.add_argument(
        "--encrypt",
        action="append",
        metavar="SELECT",
        help="attention, mlp, patch, position, embedding, head, all, plan (the least that ends the "
        "closed forms; searches may remain) or a regular expression; may be repeated",
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


def _add_train(add: Any) -> None:
    add(
        "--train",
        action="append",
        metavar="WHAT",
        help="what is trained and sent, as for plan: all (without it), head, last-block, lora:r=4, "
        "adapters:r=16 or a selection; may be repeated, or joined by /",
    )


def _add_advise(commands: Any) -> None:
    advise = commands.add_parser(
        "advise",
        help="what to use: the exact attacks on your model and batch, and the stacks that stood",
        description="Counts and measurements, no proof. Nothing is downloaded and no weight built.",
    )
    add = advise.add_argument
    add("--model", default="vit_base_patch16_224", metavar="NAME[:key=value,...]")
    add("--batch-size", type=int, default=1, metavar="B", help="images behind one update (1)")
    add(
        "--setting",
        metavar="S",
        help="finetune (weights that somebody trained) or scratch (random ones; the default "
        "without --checkpoint)",
    )
    add("--checkpoint", metavar="FILE", help="your weights, for the commands; it is not read")
    _add_train(add)
    add(
        "--see",
        default="both",
        metavar="WHO",
        help="who must not learn the images: server, clients or both (both)",
    )
    add("--json", metavar="FILE|-")
    advise.set_defaults(run=_advise, command="advise")


def _advise(options: argparse.Namespace) -> int:
    from vitguard.advise import advise_report
    from vitguard.files import check_writable, write_text

    if options.json and options.json != "-":
        check_writable(options.json)
    report = advise_report(
        options.model, batch_size=options.batch_size, setting=options.setting,
        train="/".join(options.train or ("all",)), see=options.see, checkpoint=options.checkpoint,
    )  # fmt: skip
    if options.json:
        write_text(json.dumps(report.to_json(), indent=2, allow_nan=False), options.json)
    if options.json != "-":
        report.print_to(console())
    return 0


def _plan(options: argparse.Namespace) -> int:
    from vitguard.files import check_writable, write_text
    from vitguard.plan import plan_report

    if options.json and options.json != "-":
        check_writable(options.json)
    if not (options.encrypt or options.train):
        raise InputError("Expected --encrypt SELECT or --train WHAT, got neither.")
    report = plan_report(
        options.model, options.encrypt or (), train=options.train, preset=options.preset,
        positions=options.positions,
    )  # fmt: skip
    if options.json:
        write_text(json.dumps(report.to_json(), indent=2, allow_nan=False), options.json)
    if options.json != "-":
        report.print_to(console())
    return 0


def _list(options: argparse.Namespace) -> int:
    from vitguard.registry import attack_types, defense_types
    from vitguard.threats.malicious_server import craft_types

    def describe(cls: Any) -> dict[str, Any]:
        settings = {
            f.name: None if f.default is dataclasses.MISSING else f.default
            for f in dataclasses.fields(cls)
        }
        summary = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
        return {"name": cls.name, "summary": summary, "settings": settings}

    defenses = [describe(cls) for cls in defense_types().values()]
    attacks = [{**describe(cls), "family": cls.family} for cls in attack_types().values()]
    crafts = [describe(cls) for cls in craft_types().values()]
    if options.json:
        said = {"schema": 1, "defenses": defenses, "attacks": attacks, "crafts": crafts}
        print(json.dumps(said, indent=2, default=str))
        return 0
    width = min(shutil.get_terminal_size().columns, 100)
    for title, entries in (("Defenses", defenses), ("Attacks", attacks), ("Crafts", crafts)):
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
