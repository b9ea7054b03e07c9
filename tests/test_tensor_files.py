"""Updates and checkpoints that nobody vouches for: one clear error each, before any work."""

import io
import json
import struct
import warnings
import zipfile

import pytest
import torch
from safetensors.torch import save, save_file

from vitguard.core import Update
from vitguard.errors import InputError
from vitguard.models import AprilViT, load_checkpoint

FACTS = {
    "kind": "gradient", "batch_size": 1, "local_steps": 1, "learning_rate": None,
    "optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "sealed": {}, "payloads": [],
}  # fmt: skip


def small():
    torch.manual_seed(0)
    return AprilViT(4, 2, 4, 1, 1, 2)


def archive_of(state, method=zipfile.ZIP_STORED, **more):
    """A torch file, its members written by another program."""
    buffer, out = io.BytesIO(), io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(buffer) as archive, zipfile.ZipFile(out, "w", method) as copy:
        for name in archive.namelist():
            copy.writestr(name, archive.read(name))
        for name, content in more.items():
            copy.writestr(name, content)
    return out.getvalue()


def refused(path, match):
    model = small()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError, match=match):
        load_checkpoint(model, path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.slow
def test_a_compressed_checkpoint_is_refused_before_anything_is_inflated(tmp_path, monkeypatch):
    path = tmp_path / "w.pt"
    path.write_bytes(archive_of(small().state_dict(), zipfile.ZIP_DEFLATED, bomb=bytes(10**8)))
    assert path.stat().st_size < 200_000
    monkeypatch.setattr(zipfile.ZipFile, "read", None)
    monkeypatch.setattr(torch, "load", None)
    refused(path, "without compression")


def test_members_that_share_their_bytes_are_refused(tmp_path):
    """A directory that names one stored member ten thousand times."""
    content = archive_of(small().state_dict(), bomb=bytes(10**6))
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        start = archive.start_dir
        entry = archive.getinfo("bomb")
    directory = content[start:]
    at = directory.rindex(b"PK\x01\x02")
    end = directory.rindex(b"PK\x05\x06")
    assert directory[at + 46 : at + 50] == entry.filename.encode()
    many = directory[:end] + directory[at:end] * 500
    count = directory[:end].count(b"PK\x01\x02") + 500
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, len(many), start, 0)
    path = tmp_path / "w.pt"
    path.write_bytes(content[:start] + many + tail)
    refused(path, "without compression")


def test_an_archive_that_another_program_stored_loads(tmp_path):
    path, model = tmp_path / "w.pt", small()
    source = {k: v + 1 for k, v in model.state_dict().items()}
    path.write_bytes(archive_of(source))
    load_checkpoint(model, path)
    assert all(torch.equal(v, source[k]) for k, v in model.state_dict().items())
    torch.save(source, path, _use_new_zipfile_serialization=False)
    load_checkpoint(model, path)


def of_another_kind(tensor):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "meta": tensor.to("meta"),
            "sparse": tensor.to_sparse(),
            "sparse rows": tensor.to_sparse_csr(),
            "quantised": torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
            "float8": tensor.to(torch.float8_e4m3fn),
            "complex": tensor.to(torch.complex64),
            "whole numbers": tensor.long(),
            "beyond float32": tensor.double() + 1e300,
        }


@pytest.mark.parametrize("kind", of_another_kind(torch.ones(2, 2)))
def test_tensors_of_another_kind_in_a_checkpoint_are_one_clear_error(tmp_path, kind):
    state = small().state_dict()
    state["head.weight"] = of_another_kind(state["head.weight"])[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(state, tmp_path / "w.pt")
        refused(tmp_path / "w.pt", r"head\.weight")


def test_a_weight_under_two_names_is_refused(tmp_path):
    state = small().state_dict()
    state["module.head.bias"] = state["head.bias"] + 1
    torch.save(state, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "head.bias under two names")


def test_half_precision_checkpoints_load_into_a_model_of_float32(tmp_path):
    model = small()
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        save_file(
            {k: v.to(kind) for k, v in model.state_dict().items()}, tmp_path / "w.safetensors"
        )
        load_checkpoint(model, tmp_path / "w.safetensors")
        assert all(v.dtype == torch.float32 for v in model.state_dict().values())


@pytest.mark.parametrize(
    "kind", ["meta", "sparse", "sparse rows", "quantised", "float8", "complex"]
)
def test_tensors_of_another_kind_are_not_saved_as_an_update(tmp_path, kind):
    update = Update({"w": of_another_kind(torch.ones(2, 2))[kind]})
    with pytest.raises(InputError, match="w as a dense tensor"):
        update.save(tmp_path / "u")
    assert not list(tmp_path.iterdir())


def written(path, facts, **tensors):
    header = facts if isinstance(facts, str) else json.dumps(facts)
    stored = tensors or {"tensor:w": torch.ones(2)}
    path.write_bytes(save(stored, metadata={"vitguard.update": header}))
    return path


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": True}, {"batch_size": 1.0}, {"batch_size": 2**53}, {"batch_size": 10**400},
        {"learning_rate": "0.1"}, {"learning_rate": True}, {"learning_rate": 10**400},
        {"momentum": None}, {"weight_decay": [1]}, {"optimizer": None}, {"optimizer": {}},
        {"kind": None}, {"kind": []}, {"sealed": {"a": 1}}, {"sealed": {"a": None}},
        {"sealed": [["a", "b", "c"]]}, {"sealed": {"\ud800": "x"}}, {"sealed": {"a": "\ud800"}},
        {"sealed": {"w": "also readable"}}, {"payloads": ["p"]}, {"payloads": None},
        {"payloads": [1]},
    ],
)  # fmt: skip
def test_facts_of_another_type_are_one_clear_error(tmp_path, change):
    with pytest.raises(InputError):
        Update.load(written(tmp_path / "u", {**FACTS, **change}))


@pytest.mark.parametrize("header", ["[" * 100_000, '{"a":' * 100_000, "NaN", "7", "null", '"x"'])
def test_a_header_that_is_nested_or_no_object_is_one_clear_error(tmp_path, header):
    with pytest.raises(InputError):
        Update.load(written(tmp_path / "u", header))


def test_an_update_whose_tensors_are_not_those_of_its_facts_is_refused(tmp_path):
    ones, path = torch.ones(2), tmp_path / "u"
    with_payload = {**FACTS, "payloads": ["p"]}
    for facts, tensors in (
        (FACTS, {"stranger": ones}),
        (with_payload, {"payload:p": ones}),
        (with_payload, {"payload:p": torch.ones(2, 2).byte()}),
        (FACTS, {"payload:p": ones.byte()}),
        (FACTS, {"tensor:w": ones.to(torch.float8_e4m3fn)}),
    ):
        with pytest.raises(InputError):
            Update.load(written(path, facts, **tensors))


def test_what_loads_can_be_saved_and_loads_again(tmp_path):
    """Also an empty payload and a tensor without values."""
    update = Update({"w": torch.ones(0, 3), "b": torch.ones(2)[0]}, payloads={"p": b""})
    update.save(tmp_path / "u")
    again = Update.load(tmp_path / "u")
    again.save(tmp_path / "v")
    assert (tmp_path / "u").read_bytes() == (tmp_path / "v").read_bytes()
    assert again.payloads == {"p": b""} and again.tensors["w"].shape == (0, 3)
