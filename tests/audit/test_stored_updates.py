"""Files that federated frameworks store, taken in as updates: whole weights, arrays, ciphertext."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch

import vitguard as vg
from tests.fast import fast_for
from vitguard.audit.stored import stored_update
from vitguard.cli.main import main
from vitguard.errors import InputError
from vitguard.federated.local import LocalClient, LocalFederation
from vitguard.models import build_model

SMALL = (
    "vit_tiny_patch16_224:img_size=16,patch_size=4,embed_dim=96,depth=2,num_heads=4,num_classes=10"
)
RATE = 0.05


@pytest.fixture(scope="module")
def model():
    return build_model(SMALL)


@pytest.fixture
def trained(model, photo):
    """The state dict of the model after one step on a photo, as a client has it."""
    own = copy.deepcopy(model).train()
    images = vg.Normalization().apply(photo)
    update = vg.protect(own, []).update(images, torch.tensor([3]), learning_rate=RATE)
    state = dict(model.state_dict())
    return {k: v + update.tensors[k] if k in update.tensors else v for k, v in state.items()}


def stored_as(kind, state, path):
    arrays = {k: v.numpy() for k, v in state.items()}
    if kind == "torch state dict":
        torch.save(state, path)
    elif kind == "NVFlare's global model":
        torch.save({"model": state, "train_conf": {"train": {"model": "ViT"}}}, path)
    elif kind == "arrays by name":
        np.savez(path, **arrays)
    elif kind == "a list of arrays":
        np.savez(path, *arrays.values())
    else:
        torch.save({f"module.{k}": v for k, v in state.items()}, path)
    return path


KINDS = {
    "torch state dict": "final_model.pt",
    "NVFlare's global model": "FL_global_model.pt",
    "arrays by name": "weights.npz",
    "a list of arrays": "round-1-weights.npz",
    "with a wrapper's prefix": "wrapped.pt",
}


@pytest.mark.parametrize("kind", KINDS)
def test_two_files_of_whole_weights_make_the_difference_between_them(
    model, trained, kind, tmp_path
):
    before = stored_as(kind, model.state_dict(), tmp_path / f"before-{KINDS[kind]}")
    after = stored_as(kind, trained, tmp_path / KINDS[kind])
    own = copy.deepcopy(model)
    with torch.no_grad():
        own.head.bias += 1  # the file before says what the weights were
    update = stored_update(after, own, before=before, batch_size=1, learning_rate=RATE)
    assert update.kind == "difference" and update.learning_rate == RATE
    for name, parameter in model.named_parameters():
        assert torch.equal(update.tensors[name], trained[name] - parameter), name
        assert torch.equal(own.state_dict()[name], parameter)


def test_whole_weights_alone_are_no_update_and_the_message_says_what_to_give(
    model, trained, tmp_path
):
    path = stored_as("torch state dict", trained, tmp_path / "m.pt")
    with pytest.raises(InputError, match="--before"):
        stored_update(path, model, batch_size=1)


def test_a_file_of_a_difference_is_taken_where_its_kind_is_said(model, trained, tmp_path):
    change = {k: trained[k] - v for k, v in model.state_dict().items()}
    path = stored_as("torch state dict", change, tmp_path / "diff.pt")
    update = stored_update(path, model, kind="difference", batch_size=1, learning_rate=RATE)
    assert all(torch.equal(update.tensors[k], t) for k, t in change.items())
    with pytest.raises(InputError, match="kind or the weights before"):
        stored_update(path, model, kind="difference", before=path, batch_size=1)


def test_a_head_that_differs_makes_no_difference(model, trained, tmp_path):
    before = {k: v for k, v in model.state_dict().items() if not k.startswith("head")}
    first = stored_as("torch state dict", before, tmp_path / "a.pt")
    second = stored_as("torch state dict", trained, tmp_path / "b.pt")
    with pytest.raises(InputError, match="the head was drawn at random"):
        stored_update(second, model, before=first, batch_size=1)


@pytest.mark.parametrize("spec", ["encryption", "masking"])
def test_a_file_of_ciphertext_is_an_update_that_nobody_can_read(model, photos, spec, tmp_path):
    clients = {n: LocalClient(photos[:1], torch.tensor([3])) for n in "abc"}
    seen = LocalFederation(model, clients, spec, bound=2.0).round()
    (payload,) = seen.messages[0].update.payloads.values()
    total = seen.sum_bytes[64:]
    for name, data in [("message.bin", payload)] + [("sum-0.bin", total)] * (spec == "encryption"):
        (tmp_path / name).write_bytes(data)
        update = stored_update(tmp_path / name, model, batch_size=1)
        assert not update.tensors
        assert update.sealed.keys() == dict(model.named_parameters()).keys()
    with pytest.raises(InputError, match="ciphertext"):
        stored_update(tmp_path / name, model, before=tmp_path / name, batch_size=1)


def test_what_vitguard_saved_says_itself_how_it_was_made(model, tmp_path):
    update = vg.Update({"head.bias": torch.ones(10)}, batch_size=3)
    update.save(tmp_path / "u.safetensors")
    assert stored_update(tmp_path / "u.safetensors", model).batch_size == 3
    for facts in ({"batch_size": 2}, {"kind": "gradient"}, {"learning_rate": 0.1}):
        with pytest.raises(InputError, match="says itself"):
            stored_update(tmp_path / "u.safetensors", model, **facts)


def test_what_cannot_be_an_update_is_one_clear_error(model, trained, tmp_path):
    with pytest.raises(InputError, match="no file"):
        stored_update(tmp_path / "gone.pt", model, batch_size=1)
    (tmp_path / "noise.bin").write_bytes(b"nothing of the sort")
    with pytest.raises(InputError, match=r"noise\.bin"):
        stored_update(tmp_path / "noise.bin", model, kind="gradient", batch_size=1)
    path = stored_as("torch state dict", trained, tmp_path / "m.pt")
    with pytest.raises(InputError, match="how many images"):
        stored_update(path, model, before=path)
    few = dict(list(trained.items())[:-1])
    short = stored_as("a list of arrays", few, tmp_path / "short.npz")
    with pytest.raises(InputError, match="arrays"):
        stored_update(short, model, before=path, batch_size=1)
    np.savez_compressed(tmp_path / "packed.npz", a=np.zeros(10**6))
    with pytest.raises(InputError, match="without compression"):
        stored_update(tmp_path / "packed.npz", model, before=path, batch_size=1)
    np.savez(tmp_path / "objects.npz", a=np.array([{}], dtype=object))
    with pytest.raises(InputError, match=r"objects\.npz"):
        stored_update(tmp_path / "objects.npz", model, before=path, batch_size=1)


@pytest.mark.slow
def test_the_command_line_audits_what_a_strategy_saved_before_and_after_a_client(
    model, trained, photo, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    stored_as("torch state dict", model.state_dict(), tmp_path / "before.pt")
    stored_as("a list of arrays", trained, tmp_path / "after.npz")
    command = ["audit", "--model", SMALL, "--attack", "position", "--json", "-"]
    asked = ["--update-file", "after.npz", "--before", "before.pt", "--lr", str(RATE)]
    assert main([*command, *asked, "--batch-size", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    (row,) = [f for f in report["findings"] if f["defense"] != "none"]
    assert row["verdict"] == "leaks" and "reproduces the update" in row["reason"]
    for wrong, said in (
        (["--update-file", "after.npz", "--batch-size", "1"], "--before"),
        (asked, "how many images"),
        (["--before", "before.pt"], "--update-file"),
        ([*asked, "--batch-size", "1", "--checkpoint", "before.pt"], "--checkpoint"),
    ):
        assert main([*command, *wrong]) == 2
        assert said in capsys.readouterr().err


def test_a_masked_sum_is_not_called_ciphertext_and_half_a_model_is_not_called_all(model, tmp_path):
    """The server reads a masked sum; masked values of a part say nothing of what stands beside."""
    images, labels = torch.rand(3, 3, 16, 16), torch.arange(3)
    clients = {n: LocalClient(images[i : i + 1], labels[i : i + 1]) for i, n in enumerate("abc")}
    one = LocalFederation(model, clients, "masking", bound=2.0)
    seen = one.round()
    total = tmp_path / "sum"
    total.write_bytes(seen.sum_bytes[64:])
    with pytest.raises(InputError, match="sum"):
        stored_update(total, model, batch_size=3)
    part = LocalFederation(model, clients, "masking:select=head,force=true", bound=2.0)
    (message, *_) = part.round().messages
    (data,) = message.update.payloads.values()
    file = tmp_path / "part"
    file.write_bytes(data)
    with pytest.raises(InputError, match="values"):
        stored_update(file, model, batch_size=1)


def test_the_same_weights_twice_are_no_step(tmp_path, model):
    for name in ("before.pt", "after.pt"):
        torch.save(model.state_dict(), tmp_path / name)
    with pytest.raises(InputError, match="weights that a step has changed, got the same"):
        stored_update(
            tmp_path / "after.pt", copy.deepcopy(model), before=tmp_path / "before.pt", batch_size=1
        )


@pytest.mark.parametrize("kind", ["difference", "gradient"])
def test_a_file_without_a_tensor_of_the_model_is_no_update_that_resists(tmp_path, model, kind):
    """Such as the content of a sealed message: attacks were blocked by what is not there."""
    torch.save({"vitguard.message": b"ciphertext"}, tmp_path / "a.pt")
    np.savez(tmp_path / "b.npz", **{"vitguard.sealed": np.arange(9, dtype=np.uint8)})
    torch.save({"epoch": 3}, tmp_path / "c.pt")
    for name in ("a.pt", "b.npz", "c.pt"):
        with pytest.raises(InputError, match=r"write_bytes"):
            stored_update(tmp_path / name, model, kind=kind, batch_size=1, learning_rate=0.1)
    for tensors in ({}, {"vitguard.shuffle.unknown": torch.ones(1, 1, 96)}):
        with pytest.raises(InputError, match="plain or sealed"):
            vg.audit_update(model, vg.Update(tensors, kind=kind), attacks="position")


@pytest.mark.parametrize("last", [True, False])
def test_weights_that_a_defense_added_are_part_of_the_difference(model, last, tmp_path):
    """What a stock strategy stores of clients that shuffle: the unknown token is trained too."""
    sent = copy.deepcopy(model)
    vg.protect(sent, "shuffle:ratio=0.5")
    token, own = "vitguard.shuffle.unknown", sent.state_dict()
    before, after = (
        {k: t + 0.5 * i if t.is_floating_point() else t for k, t in own.items()} for i in (0, 1)
    )
    if not last:
        before, after = ({f"module.{k}": t for k, t in s.items()} for s in (before, after))
    for name, state in (("before.pt", before), ("after.pt", after)):
        torch.save(state, tmp_path / name)
    update = stored_update(
        tmp_path / "after.pt", model, before=tmp_path / "before.pt", batch_size=1
    )
    names = {n for n, _ in model.named_parameters()}
    assert update.tensors.keys() == names | {token}
    assert all(torch.allclose(t, torch.tensor(0.5)) for t in update.tensors.values())
    np.savez(tmp_path / "after.npz", *(t.numpy() for t in after.values()))
    with pytest.raises(InputError, match="by name"):
        stored_update(tmp_path / "after.npz", model, before=tmp_path / "before.pt", batch_size=1)


def objects_of_flower(state, folder):
    flwr = pytest.importorskip("flwr.app", reason="needs vitguard[flower]")
    arrays = flwr.ArrayRecord(state)
    torch.save(arrays, folder / "a.pt")
    (folder / "b.pkl").write_bytes(pickle.dumps(arrays))
    (folder / "c.bin").write_bytes(arrays.deflate() if hasattr(arrays, "deflate") else b"flwr.app")
    return "to_torch_state_dict"


def objects_of_nvflare(state, folder):
    dxo = pytest.importorskip("nvflare.apis.dxo", reason="needs vitguard[nvflare]")
    from nvflare.app_common.abstract.fl_model import FLModel, ParamsType

    dxo.DXO(dxo.DataKind.WEIGHT_DIFF, data={"head.bias": b"123"}).to_file(str(folder / "a.fobs"))
    torch.save(FLModel(params=state, params_type=ParamsType.FULL), folder / "b.pt")
    return r"dxo\.data"


def arrays_of_numpy(state, folder):
    arrays = {k: t.numpy() for k, t in state.items()}
    torch.save(arrays, folder / "a.pt")
    np.save(folder / "b.npy", arrays, allow_pickle=True)
    return r"numpy\.savez"


OBJECTS = [objects_of_flower, objects_of_nvflare, arrays_of_numpy]


@pytest.mark.parametrize("write", fast_for(OBJECTS, fast=[arrays_of_numpy]))
def test_objects_of_a_framework_are_refused_with_how_to_store_what_is_in_them(
    model, write, tmp_path
):
    torch.save(model.state_dict(), tmp_path / "before.pt")
    folder = tmp_path / "stored"
    folder.mkdir()
    how = write({"head.bias": torch.ones(10)}, folder)
    for file in folder.iterdir():
        with pytest.raises(InputError, match=how):
            stored_update(file, model, before=tmp_path / "before.pt", batch_size=1)


@pytest.mark.slow
def test_what_nvflare_persists_is_read(model, trained, tmp_path):
    pytest.importorskip("nvflare", reason="needs vitguard[nvflare]")
    from nvflare.app_common.abstract.model import make_model_learnable
    from nvflare.app_opt.pt.model_persistence_format_manager import PTModelPersistenceFormatManager

    torch.save(model.state_dict(), tmp_path / "before.pt")
    held = PTModelPersistenceFormatManager(dict(model.state_dict()))
    meta = {"NUM_STEPS_CURRENT_ROUND": np.float64(3)}
    held.update(make_model_learnable({k: t.numpy() for k, t in trained.items()}, meta))
    torch.save(held.to_persistence_dict(), tmp_path / "FL_global_model.pt")
    update = stored_update(
        tmp_path / "FL_global_model.pt", model, before=tmp_path / "before.pt", batch_size=1
    )
    assert torch.equal(update.tensors["head.bias"], trained["head.bias"] - model.head.bias)
