"""Ten thousand mutations of everything that is read or typed; the program does 500,000."""

import importlib.util
import sys
from pathlib import Path

import pytest

from vitguard.defenses.encryption import keyfile, wire

FILE = Path(__file__).parents[1] / "benchmarks" / "fuzz.py"


pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(scope="module")
def fuzz():
    sys.path.insert(0, str(FILE.parent))
    spec = importlib.util.spec_from_file_location("fuzz", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(FILE.parent))


def faults(found):
    return {f"{name}: {k}" for name, c in found.items() for k in c if k.startswith("FAULT")}


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_mutation_changes_a_value_and_all_errors_are_typed(fuzz, count):
    found = fuzz.batch(count, seed=7)
    assert not faults(found)
    assert sum(sum(counts.values()) for counts in found.values()) >= count  # more with records
    for name in ("message", "sum", "key file"):  # nothing changed is accepted without a key
        assert "other" not in found[name] and found[name]["refused"] > 0.9 * sum(
            found[name].values()
        )
    assert all(c["refused"] and (len(c) > 1 or sum(c.values()) < 100) for c in found.values())
    assert keyfile._derived.__module__ == keyfile.__name__  # as it was


@pytest.mark.parametrize(
    "hole",
    [
        "proof",
        pytest.param("undo", marks=pytest.mark.slow),
        "range and canary",
        "tag",
        "json",
        "mask signature",
        pytest.param("ledger", marks=pytest.mark.slow),
        pytest.param("usage", marks=pytest.mark.slow),
        "types",
    ],
)
def test_the_program_finds_a_hole_that_is_made_on_purpose(fuzz, monkeypatch, hole):
    kinds = {
        "proof": "message", "undo": "message of an insider",
        "range and canary": "sum of the server", "tag": "key file", "json": "manifest",
        "mask signature": "masked message", "ledger": "state of a guard", "usage": "command line",
        "types": "what a run keeps",
    }  # fmt: skip
    share = fuzz.KINDS[kinds[hole]][2]
    kind = (*fuzz.KINDS[kinds[hole]][:2], max(share, 0.1))
    monkeypatch.setattr(fuzz, "KINDS", {kinds[hole]: kind})
    if hole == "proof":
        monkeypatch.setattr(wire, "_check_proof", lambda *arguments: None)
    elif hole == "undo":
        from vitguard.defenses.encryption.server import Aggregator

        monkeypatch.setattr(Aggregator, "_take_back", lambda self, added: None)
    elif hole == "range and canary":
        from vitguard.defenses.encryption import client

        monkeypatch.setattr(client, "_TRUE_DISTANCE", 1.0)
        monkeypatch.setattr(client, "canary", lambda *arguments: Anything())
        monkeypatch.setattr(client.Decryptor, "_largest", lambda self, header: 2**62)
    elif hole == "tag":
        from vitguard.defenses.encryption import keys

        monkeypatch.setattr(keyfile, "_associated", lambda stored: b"")
        monkeypatch.setattr(keys.KeyFacts, "fingerprint", b"1" * 16)
    elif hole == "mask signature":
        monkeypatch.setattr("vitguard.defenses.masking.wire.verify", lambda *arguments: None)
    elif hole == "ledger":
        from vitguard.defenses.privacy.accounting import Ledger

        monkeypatch.setattr(
            Ledger, "load_state_dict", lambda self, state: setattr(self, "_runs", {})
        )
    elif hole == "usage":
        parser = sys.modules["vitguard.cli.main"]._Parser
        monkeypatch.setattr(parser, "error", lambda self, message: 1 / 0)
    elif hole == "types":
        state = pytest.importorskip("vitguard.federated.nvflare.state")
        monkeypatch.setattr(state, "_require", lambda stored, kinds: None)
    else:
        from vitguard.defenses.encryption import manifest

        monkeypatch.setattr(manifest, "parsed_json", __import__("json").loads)
    assert faults(fuzz.batch(6_000, seed=1))


class Anything:
    """Equal to every canary."""

    def __rmul__(self, other):
        return self

    def __eq__(self, other):
        return True

    def __ne__(self, other):
        return False

    __hash__ = None
    real = imag = 1.0

    def __complex__(self):
        return 1 + 1j


def test_the_header_layout_is_the_one_the_program_knows(fuzz):
    from fuzzing.messages import FIELDS

    assert FIELDS["id"][0] == wire._FIXED.size
