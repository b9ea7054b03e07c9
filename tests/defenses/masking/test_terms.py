"""Terms of a masked run as JSON: read as they were written, or refused."""

import copy
import json
import pickle

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


def test_who_takes_part_cannot_change_after_the_terms_were_made(terms):
    """Else the digest that messages are bound to would be of other clients."""
    given = dict(terms.identities)
    made = Terms(terms.manifest, given, terms.server, 4)
    bound = made.binding(1, "a base")
    given["e"] = given["a"]
    with pytest.raises(TypeError):
        made.identities["a"] = given["b"]
    assert made.clients == ("a", "b", "c", "d") and made.binding(1, "a base") == bound
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert again == made and again.binding(1, "a base") == bound


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
