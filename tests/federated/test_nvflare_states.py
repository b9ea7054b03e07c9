"""What an NVFlare site and its server keep between rounds is read exactly, or not at all."""

import json
from dataclasses import asdict

import pytest
import torch

pytest.importorskip("nvflare")

from vitguard.errors import Rejected
from vitguard.federated.nvflare.state import ClientState, ServerState
from vitguard.rounds import Progress

SERVER = asdict(ServerState("a run", "a base", [1, 2]))


def written(path, stored):
    path.touch(0o600)
    path.write_text(json.dumps(stored))
    return path


def test_a_state_reads_as_it_was_written(tmp_path):
    state = ServerState("a run", "a base", [1, 2])
    state.write(tmp_path / "server")
    assert ServerState.read(tmp_path / "server", "a run") == state
    site = ClientState("a run", Progress(3, "a base"), "ab", 4, "{}", {"w": torch.ones(2)})
    site.write(tmp_path / "site")
    read = ClientState.read(tmp_path / "site", "a run")
    assert torch.equal(read.weights.pop("w"), site.weights.pop("w")) and read == site


@pytest.mark.parametrize(
    "wrong",
    [
        {"base": []}, {"base": None}, {"rounds": ["1"]}, {"rounds": [True]}, {"rounds": [1.0]},
        {"rounds": 3}, {"rounds": None}, {"more": 1}, {"run": 3},
    ],
)  # fmt: skip
def test_a_server_does_not_go_on_from_something_else(tmp_path, wrong):
    with pytest.raises(Rejected):
        ServerState.read(written(tmp_path / "server", {**SERVER, **wrong}), "a run")


@pytest.mark.parametrize("field", SERVER)
def test_a_server_does_not_go_on_without_a_field(tmp_path, field):
    left = {name: value for name, value in SERVER.items() if name != field}
    with pytest.raises(Rejected):
        ServerState.read(written(tmp_path / "server", left), "a run")


@pytest.mark.parametrize(
    "wrong", [{"training": "4"}, {"training": True}, {"total": None}, {"guard": {}}, {"more": 1}]
)
def test_a_site_does_not_go_on_from_something_else(tmp_path, wrong):
    ClientState("a run").write(tmp_path / "site")
    data = (tmp_path / "site").read_bytes()
    header = json.loads(data[8:])
    facts = {**json.loads(header["__metadata__"]["vitguard"]), **wrong}
    header["__metadata__"]["vitguard"] = json.dumps(facts)
    text = json.dumps(header).encode()
    (tmp_path / "site").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(Rejected):
        ClientState.read(tmp_path / "site", "a run")
