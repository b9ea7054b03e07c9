"""An honest-but-curious NVFlare server: it follows the protocol, and attacks what clients send.

Three sites with one photo each train one step from the public model in NVFlare's simulator, once
with NVFlare's own averaging and once with vitguard's. A filter of the server keeps each result; the
report says what they give away: python curious_server.py --out FOLDER.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SITES = ("site-1", "site-2", "site-3")
RATE = 0.05


def main() -> None:
    """Run both jobs, attack what was kept, write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("curious-run"))
    out = parser.parse_args().out.resolve()
    out.mkdir(parents=True)
    sys.path.insert(0, str(HERE))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    for name in ("VITGUARD_PASSPHRASE", "VITGUARD_SERVER_PASSPHRASE"):
        os.environ.setdefault(name, secrets.token_hex(16))

    from client import photo_of
    from curious import Record
    from model import tiny_vit
    from nvflare.recipe import SimEnv

    import vitguard as vg
    from vitguard.federated.curious import Recording

    for name, recipe in (("plain", plain_job()), ("sealed", sealed_job(out / "keys"))):
        recipe.add_server_input_filter(Record(str(out / name), RATE), tasks=["train"])
        recipe.execute(SimEnv(num_clients=len(SITES), workspace_root=str(out / "workspace")))
    images = {site: photo_of(site) for site in SITES}
    images = {site: ((pixels + 1) / 2, labels) for site, (pixels, labels) in images.items()}
    kept = Recording(out / "plain").rounds(tiny_vit(), images=images, title="without vitguard")
    kept += Recording(out / "sealed").rounds(
        tiny_vit(), "encryption", images=images, title="with vitguard"
    )
    report = vg.audit(kept, attacks=["position", "span"], model_name="the example's model")
    report.save(out / "curious-server.html")
    report.save(out / "curious-server.json")
    print(report.to_markdown())


def plain_job() -> Any:
    """Return NVFlare's own averaging of weight differences."""
    from nvflare.apis.dxo import DataKind
    from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
    from nvflare.client.config import ExchangeFormat, TransferType

    return FedAvgRecipe(
        name="plain", min_clients=len(SITES), num_rounds=1, model=MODEL,
        train_script=str(HERE / "client.py"), train_args="--photo",
        aggregator_data_kind=DataKind.WEIGHT_DIFF, params_transfer_type=TransferType.DIFF,
        server_expected_format=ExchangeFormat.PYTORCH,
    )  # fmt: skip


def sealed_job(folder: Path) -> Any:
    """Return vitguard's averaging of ciphertext."""
    from model import tiny_vit

    from vitguard.defenses.encryption import KeySet, Manifest, SigningKey
    from vitguard.federated.nvflare import encrypted_fedavg

    folder.mkdir(mode=0o700)
    server_phrase = os.environ["VITGUARD_SERVER_PASSPHRASE"]
    signing = SigningKey.generate()
    signing.save(folder / "signing.json", server_phrase)
    keys = KeySet.generate(server=signing.public_bytes())
    keys.for_server().save(folder / "server.json", server_phrase)
    for site in SITES:
        keys.for_client(site).save(folder / f"{site}.json", os.environ["VITGUARD_PASSPHRASE"])
    return encrypted_fedavg(
        name="sealed", manifest=Manifest.of(tiny_vit().state_dict(), bounds=1.0), model=MODEL,
        client_keys=str(folder / "{site}.json"), server_keys=str(folder / "server.json"),
        signing=str(folder / "signing.json"), min_clients=len(SITES), num_rounds=1,
        train_script=str(HERE / "client.py"), train_args="--photo",
    )  # fmt: skip


MODEL = {"path": "model.tiny_vit", "args": {}}

if __name__ == "__main__":
    main()
