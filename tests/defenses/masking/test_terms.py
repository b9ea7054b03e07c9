"""Terms of a masked run as JSON: read as they were written, or refused."""

import json

import pytest
import torch

pytest.importorskip("cryptography")

from vitguard.defenses.encryption import Manifest, SigningKey
from vitguard.defenses.masking import Terms
from vitguard.errors import InputError


@pytest.fixture(scope="module")
def terms():
    keys = {c: SigningKey.generate().public_bytes() for c in "abcd"}
    manifest = Manifest.of({"w": torch.zeros(4)}, bounds=1.0)
    return Terms(manifest, keys, SigningKey.generate().public_bytes(), 4)


def test_terms_read_as_they_were_written(terms):
    again = Terms.from_json(terms.to_json())
    assert again == terms and again.binding(1, "a base") == terms.binding(1, "a base")


@pytest.mark.parametrize(
    "change",
    [
        {"threshold": 0}, {"threshold": False}, {"threshold": None}, {"threshold": 2},
        {"threshold": 5}, {"threshold": 4.0}, {"server": "00"}, {"server": None}, {"more": 1},
        {"identities": {}}, {"identities": []}, {"identities": {"a": 3}}, {"manifest": None},
        {"manifest": "x"},
    ],
)  # fmt: skip
def test_changed_terms_are_one_clear_error(terms, change):
    with pytest.raises(InputError):
        Terms.from_json(json.dumps({**json.loads(terms.to_json()), **change}))


@pytest.mark.parametrize("name", ["manifest", "identities", "server", "threshold"])
def test_terms_without_a_part_are_refused(terms, name):
    stored = json.loads(terms.to_json())
    del stored[name]
    with pytest.raises(InputError):
        Terms.from_json(json.dumps(stored))


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 200_000, "[1e400]", b"\xff"])
def test_what_is_no_terms_is_one_clear_error(text):
    with pytest.raises(InputError):
        Terms.from_json(text)
