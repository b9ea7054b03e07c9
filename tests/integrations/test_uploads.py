"""What leaves by Hugging Face's hub: a checkpoint that counts, and no secret of the guard."""

import json
import shutil

import pytest
import torch

from vitguard.errors import Unprotected

one = pytest.importorskip("tests.integrations.test_transformers")
hub = pytest.importorskip("huggingface_hub")
PRIVATE = one.PRIVATE


class Done:
    """An upload that has ended."""

    def is_done(self):
        return True

    done = is_done

    def result(self):
        return None


@pytest.fixture
def uploads(tmp_path, monkeypatch):
    """Where uploads go in place of the hub: a folder for each, with its path there."""
    made = []

    def upload_folder(self=None, *, folder_path, path_in_repo="", ignore_patterns=None, **_):
        kept = tmp_path / f"upload{len(made)}"
        shutil.copytree(folder_path, kept, ignore=shutil.ignore_patterns(*(ignore_patterns or [])))
        made.append((path_in_repo, kept))
        return Done()

    monkeypatch.setattr(hub.HfApi, "upload_folder", upload_folder)
    for name in ("upload_folder", "create_repo"):  # older releases import functions
        if hasattr(one.transformers.trainer, name):
            monkeypatch.setattr(one.transformers.trainer, name, lambda *a, **k: upload_folder(**k))
    repository = hub.RepoUrl("https://huggingface.co/somebody/photos")
    monkeypatch.setattr(hub.HfApi, "create_repo", lambda *a, **k: repository)
    monkeypatch.setattr(one.Trainer, "create_model_card", lambda *a, **k: None)
    return made


def pushed(folder, guard, strategy="checkpoint", **changes):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "logging_steps": 2}
    made = one.trainer(
        guard.model, folder, push_to_hub=True, hub_strategy=strategy,
        hub_model_id="somebody/photos", hub_token="none", **(settings | changes),
    )  # fmt: skip
    made.train()
    return made


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_an_uploaded_checkpoint_holds_what_was_spent_and_resumes(tmp_path, uploads, strategy):
    stack = f"positions:kind=random+{one.SHUFFLE}+{PRIVATE}"
    _, guard = one.guarded(stack)
    pushed(tmp_path / "run", guard, strategy)
    checkpoint = next(folder for path, folder in uploads if path)
    assert {"vitguard.json", "vitguard.safetensors"} <= {f.name for f in checkpoint.iterdir()}
    model, again = one.guarded(stack)
    one.trainer(model, tmp_path / "other", max_steps=3).train(str(checkpoint))
    assert again.privacy_spent().steps == 3


def with_secrets():
    """A guard whose state holds all that is secret: a generator, a key, residuals."""
    _, guard = one.guarded("low-rank:rank=1,feedback=true+inspect")
    guard.accept(guard.export())
    with guard.round(1, base="start"):
        guard.update(one.IMAGES[:2], torch.arange(2))
    assert guard.state_dict().keys() == {"version", "ledger", "draws", "inspection", "residuals"}
    return guard


def test_no_upload_holds_a_secret_of_the_guard_and_what_it_keeps_stays(tmp_path, uploads):
    guard = with_secrets()
    key = guard.state_dict()["inspection"]
    guard.will_seal()
    pushed(tmp_path / "run", guard)
    for _, folder in uploads:
        for file in folder.rglob("vitguard*"):
            assert json.loads(file.read_bytes()).keys() <= {"version", "ledger"}
    checkpoint = next(folder for path, folder in uploads if path)
    one.trainer(guard.model, tmp_path / "other", max_steps=3).train(str(checkpoint))
    assert guard.state_dict()["inspection"] == key and guard.state_dict()["residuals"]


@pytest.mark.parametrize("by", ["train", "hand"])
def test_positions_that_stay_on_the_client_are_not_uploaded(tmp_path, uploads, by):
    _, guard = one.guarded("withheld")
    before = {n: t.clone() for n, t in guard.model.state_dict().items()}
    with pytest.raises(Unprotected, match="stay on the client"):
        if by == "train":
            pushed(tmp_path, guard)
        else:
            one.trainer(guard.model, tmp_path, hub_token="none").push_to_hub()
    assert not uploads
    assert all(torch.equal(t, before[n]) for n, t in guard.model.state_dict().items())


def test_weights_saved_alone_bring_what_was_spent_on_them(tmp_path):
    """Without an optimizer in the checkpoint its Trainer goes on with a new one."""
    _, guard = one.guarded(PRIVATE)
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "save_only_model": True}
    one.trainer(guard.model, tmp_path, **settings).train()
    model, again = one.guarded(PRIVATE)
    one.trainer(model, tmp_path, max_steps=3).train(str(tmp_path / "checkpoint-2"))
    assert again.privacy_spent().steps == 3
