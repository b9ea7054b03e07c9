"""What the options of `vitguard audit` must be, before anything heavy is imported."""

from __future__ import annotations

import argparse
import math

from vitguard.errors import expected

__all__ = ["check_options"]


def check_options(options: argparse.Namespace) -> None:
    """Refuse options that contradict each other or lie out of range; fill in the batch size.

    Raises:
        InputError: An option is refused.
    """
    if options.update_file and options.num_images is not None:
        raise expected("--update-file with --batch-size, or none", "--num-images")
    if options.before:
        if not options.update_file:
            raise expected("--before with --update-file", "it alone")
        if options.checkpoint or options.pretrained:
            raise expected(
                "--before, which is the weights before the step",
                "--checkpoint or --pretrained as well",
            )  # fmt: skip
    if not all(options.images or ()):
        raise expected("--images FILE or FOLDER", "an empty path")  # else the working folder
    if not options.update_file:
        options.batch_size = 1 if options.batch_size is None else options.batch_size
    if not 0 <= options.seed < 2**63:
        raise expected("seed as a whole number of at least 0 and below 2**63", options.seed)
    for name in ("max_psnr", "max_gain"):
        if (limit := getattr(options, name)) is not None and not math.isfinite(limit):
            raise expected(f"--{name.replace('_', '-')} as a finite number of dB", limit)
    for name in ("num_images", "batch_size", "workers", "local_steps", "iterations"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise expected(f"--{name.replace('_', '-')} of at least 1", value)
    if options.optimizer not in (None, "sgd", "adam", "adamw"):
        raise expected("--optimizer sgd, adam or adamw", repr(options.optimizer))
    if options.update == "difference" and options.lr is None:
        raise expected("--lr with --update difference", "none")
    said = {
        "--lr": options.lr is not None, "--local-steps": (options.local_steps or 1) > 1,
        "--optimizer": options.optimizer is not None,
    }  # fmt: skip
    steps = [name for name, given in said.items() if given]
    if options.update != "difference" and not options.update_file and steps:
        raise expected(f"--update difference with {' and '.join(steps)}", "--update gradient")
    if options.lr is not None and not 0 < options.lr < float("inf"):
        raise expected("--lr above 0", options.lr)
    if bool(options.mean) != bool(options.std):
        raise expected("--mean and --std together", "one of them")
    if options.html and not options.html.endswith(".html"):
        raise expected("--html FILE ending in .html", repr(options.html))
