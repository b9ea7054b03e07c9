"""Make the keys of four clients, once, before the first run: python make_keys.py FOLDER [masks]."""

import os
import sys

import torch
from flower_cifar10.task import EXAMPLES, make_model

import vitguard as vg
from vitguard.defenses.encryption import Manifest, SigningKey
from vitguard.federated.flower import make_keys, write_masked_keys

CLIENTS = ["0", "1", "2", "3"]


def main(folder: str, variant: str = "encryption") -> None:
    """Write them; the passphrase is in VITGUARD_PASSPHRASE."""
    passphrase = os.environ["VITGUARD_PASSPHRASE"]
    stack = [vg.FixedPositions("sincos"), vg.PatchShuffle(ratio=0.5), vg.EncryptedGradients()]
    guard = vg.protect(make_model(), stack, generator=torch.Generator())
    sealed, limits = guard.encrypted(), {"bounds": 0.5, "max_weight": EXAMPLES}
    if variant == "masks":  # in a deployment each client makes its own, and gives its public half
        identities = {name: SigningKey.generate() for name in CLIENTS}
        write_masked_keys(
            folder, passphrase, Manifest.of(sealed, **limits), identities,
            signing=SigningKey.generate(),
        )  # fmt: skip
    else:
        make_keys(folder, passphrase, sealed, clients=CLIENTS, **limits)


if __name__ == "__main__":
    main(*sys.argv[1:])
