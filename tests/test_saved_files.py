"""Files that an earlier version wrote are still read; tests/files/README.md says which."""

import json
import stat
from pathlib import Path

import pytest
import timm
import torch

from vitguard.audit import audit
from vitguard.audit.received import audit_update
from vitguard.core import Update
from vitguard.guard import protect

FILES = Path(__file__).parent / "files"


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model(
            "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2,
            num_classes=3,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "facts", "count", "sums"),
    [
        ("gradient", ("gradient", 2, 1, None, "sgd"), 19,
         {"cls_token": 1.4901161193847656e-07, "patch_embed.proj.weight": 7.282778824446723e-09}),
        ("withheld", ("gradient", 2, 1, None, "sgd"), 19,
         {"cls_token": -0.0005947919562458992, "patch_embed.proj.weight": 0.00017463272570239496}),
        ("difference", ("difference", 2, 3, 0.01, "adamw"), 20,
         {"cls_token": -0.009625082486309111, "pos_embed": -0.09123856853693724}),
    ],
)  # fmt: skip
def test_updates_of_the_last_version_load_with_every_fact_and_value(name, facts, count, sums):
    update = Update.load(FILES / f"{name}.safetensors")
    read = (update.kind, update.batch_size, update.local_steps, update.learning_rate)
    assert (*read, update.optimizer) == facts
    assert len(update.tensors) == count and not update.payloads
    assert {n: float(update.tensors[n].double().sum()) for n in sums} == pytest.approx(
        sums, rel=1e-9
    )
    sealed = {"pos_embed": "withheld positions stay on the client"} if name == "withheld" else {}
    assert dict(update.sealed) == sealed


@pytest.mark.slow
def test_an_update_of_the_last_version_is_audited_and_saves_as_the_same(model, tmp_path):
    update = Update.load(FILES / "gradient.safetensors")
    update.save(tmp_path / "again.safetensors")
    again = Update.load(tmp_path / "again.safetensors")
    assert again.tensors.keys() == update.tensors.keys()
    assert all(torch.equal(again.tensors[n], t) for n, t in update.tensors.items())
    report = audit_update(model, update, defenses="positions:kind=frozen", attacks="position")
    (finding,) = (f for f in report.findings if f.defended)
    assert finding.verdict == "blocked" and "pos_embed" in finding.reason


def keys(value, path=""):
    """Return the path of every key of a JSON value; entries of a list share one."""
    if isinstance(value, dict):
        return {f"{path}/{k}" for k in value} | {
            p for k, v in value.items() for p in keys(v, f"{path}/{k}")
        }
    return {p for v in value for p in keys(v, f"{path}/*")} if isinstance(value, list) else set()


@pytest.mark.slow
def test_a_report_has_every_json_name_of_the_last_version_with_the_same_schema(model):
    before = json.loads((FILES / "report.json").read_text())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        batch = torch.rand(1, 3, 8, 8), torch.tensor([2])
    now = audit(
        model, batch, defenses="positions:kind=frozen", attacks=["position", "fgsm"]
    ).to_json()
    assert now["schema"] == before["schema"] == 1
    assert not keys(before) - keys(json.loads(json.dumps(now)))


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8),
    reason="older releases of torch draw other weights from the same seed",
)
def test_the_model_they_were_made_with_is_this_one(model):
    """The gradient of the same photos on the same weights is the one in the file."""
    from vitguard import data

    pixels = data.sample_images((8, 8), count=2).pixels
    guard = protect(model.train(), "positions:kind=frozen")
    update = guard.update(pixels, torch.tensor([2, 0]))
    saved = Update.load(FILES / "gradient.safetensors")
    for name, tensor in update.tensors.items():
        torch.testing.assert_close(tensor, saved.tensors[name], rtol=1e-4, atol=1e-6)


def test_a_saved_update_is_for_its_owner_alone(tmp_path):
    """It may show the images of one client, whoever may read the folder."""
    path = tmp_path / "update.safetensors"
    path.write_bytes(b"")
    path.chmod(0o644)
    Update({"a": torch.ones(2)}).save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
