"""Make the keys of four clients, once, before the first run: python make_keys.py FOLDER."""

import os
import sys

import torch
from flower_cifar10.task import EXAMPLES, make_model

import vitguard as vg
from vitguard.federated.flower import make_keys


def main(folder: str) -> None:
    """Write them; the passphrase is in VITGUARD_PASSPHRASE."""
    stack = [vg.FixedPositions("sincos"), vg.PatchShuffle(ratio=0.5), vg.EncryptedGradients()]
    guard = vg.protect(make_model(), stack, generator=torch.Generator())
    make_keys(
        folder, os.environ["VITGUARD_PASSPHRASE"], guard.encrypted(),
        clients=["0", "1", "2", "3"], bounds=0.5, max_weight=EXAMPLES,
    )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
