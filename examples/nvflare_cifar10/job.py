"""Federated training under NVFlare in which the server adds ciphertext: three clients, two rounds.

It runs in NVFlare's simulator on one machine, then compares what the clients opened with the plain
weighted average of what they sent. A real deployment makes the keys once, hands each site its
own file, and replaces `SimEnv` by `ProdEnv`.

    python examples/nvflare_cifar10/job.py --out run
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
SITES = ("site-1", "site-2", "site-3")
ROUNDS, BOUND, HEAVIEST = 2, 0.25, 64.0


def main() -> None:
    """Make keys, run the job, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("nvflare-run"))
    out = parser.parse_args().out.resolve()
    record, keys_of = out / "record", out / "keys"
    record.mkdir(mode=0o700, parents=True)  # plain differences of each site
    keys_of.mkdir(mode=0o700)
    sys.path.insert(0, str(HERE))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])

    from model import tiny_vit
    from nvflare.recipe import SimEnv

    from vitguard.defenses.encryption import KeySet, Manifest, SigningKey, worst_error
    from vitguard.federated.nvflare import encrypted_fedavg

    # passphrases reach the processes by the environment, never by the job
    for name in ("VITGUARD_PASSPHRASE", "VITGUARD_SERVER_PASSPHRASE"):
        os.environ.setdefault(name, secrets.token_hex(16))
    server_phrase = os.environ["VITGUARD_SERVER_PASSPHRASE"]
    signing = SigningKey.generate()
    signing.save(keys_of / "signing.json", server_phrase)
    keys = KeySet.generate(max_clients=10, server=signing.public_bytes())
    keys.for_server().save(keys_of / "server.json", server_phrase)
    for site in SITES:
        keys.for_client(site).save(keys_of / f"{site}.json", os.environ["VITGUARD_PASSPHRASE"])
    manifest = Manifest.of(tiny_vit().state_dict(), bounds=BOUND, max_weight=HEAVIEST)

    recipe = encrypted_fedavg(
        name="vitguard",
        manifest=manifest,
        model={"path": "model.tiny_vit", "args": {}},
        client_keys=str(keys_of / "{site}.json"),
        server_keys=str(keys_of / "server.json"),
        signing=str(keys_of / "signing.json"),
        min_clients=len(SITES),
        num_rounds=ROUNDS,
        inspect=True,
        train_script=str(HERE / "client.py"),
        train_args=f"--record {record}",
    )
    run = recipe.execute(SimEnv(num_clients=len(SITES), workspace_root=str(out / "workspace")))
    print("status:", run.get_status())
    compare(record, worst_error(BOUND, keys, [16, 32, 48], max_weight=HEAVIEST))
    report_sizes(out, manifest.values)


def compare(record: Path, limit: float) -> None:
    """Compare the model that clients opened in round 1 with the plain average of round 0."""
    first = [torch.load(record / f"{site}-0.pt") for site in SITES]
    whole = sum(f["weight"] for f in first)
    worst = 0.0
    for site in SITES:
        opened = torch.load(record / f"{site}-1.pt")["before"]
        for name, before in first[0]["before"].items():
            mean = sum(f["weight"] / whole * f["difference"][name] for f in first)
            worst = max(worst, float((opened[name] - before - mean).abs().max()))
    print(f"largest error of the average: {worst:.2e}, limit of the preset {limit:.2e}")
    if not worst <= limit + 1e-6:  # float32 weights hold seven digits
        sys.exit("the average is not that of the plain differences")


def report_sizes(out: Path, values: int) -> None:
    """Print what the server kept of the last sum, in bytes a value."""
    for path in sorted(out.glob("workspace/**/vitguard/sum-*.bin")):
        size = path.stat().st_size
        print(f"{path.name}: {size} bytes, {size / values:.2f} a value")


if __name__ == "__main__":
    main()
