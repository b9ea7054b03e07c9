"""Make the keys of four clients, once, before the first run: python make_keys.py FOLDER."""

import os
import sys

from flower_cifar10.task import EXAMPLES, make_model, protected

from vitguard.defenses.encryption import Manifest, SigningKey
from vitguard.federated.flower import make_keys, write_masked_keys

CLIENTS = ["0", "1", "2", "3"]


def main(folder: str) -> None:
    """Write them, for encryption and for masks; the passphrase is in VITGUARD_PASSPHRASE."""
    passphrase = os.environ["VITGUARD_PASSPHRASE"]
    config = {"variant": "encrypted", "num-server-rounds": 1, "local-epochs": 1}
    sealed = protected(make_model(), config).encrypted()
    limits = {"bounds": 0.5, "max_weight": EXAMPLES}
    make_keys(folder, passphrase, sealed, clients=CLIENTS, **limits)
    # in a deployment each client makes its own identity, and gives away `public_bytes()`
    identities = {name: SigningKey.generate() for name in CLIENTS}
    write_masked_keys(folder, passphrase, Manifest.of(sealed, **limits), identities)


if __name__ == "__main__":
    main(sys.argv[1])
