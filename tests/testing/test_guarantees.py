"""Every line under *Guarantees* has a property that breaks with it, and stands on its page."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

from vitguard.defenses.privacy import ClientPrivacy
from vitguard.registry import defense_types
from vitguard.testing import guarantees_of
from vitguard.testing.guarantees import Guarantee, guarantees_in

ROOT = Path(__file__).parents[2]


def _script():
    spec = importlib.util.spec_from_file_location("mutations", ROOT / "benchmarks" / "mutations.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutations"] = module
    spec.loader.exec_module(module)
    return module


script = _script()
MUTATIONS = script.Mutation.all()
PROMISED = script.promised()


def test_every_class_of_the_package_is_read():
    classes = {g.owner for g in PROMISED}
    assert {"PatchShuffle", "KeySet", "ProtectMod", "Ledger", "Draws"} <= classes
    for kind in defense_types().values():
        assert set(guarantees_of(kind)) <= set(PROMISED), kind
    assert len(PROMISED) >= 45


@pytest.mark.slow
def test_no_docstring_promises_anything_in_a_form_that_is_not_read():
    for path in sorted((ROOT / "vitguard").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Module):
                text = ast.get_docstring(node) or ""
                read = isinstance(node, ast.ClassDef) and "\nGuarantees:\n    " in text
                assert text.count("Guarantees:") == int(read), f"{path}: {text[:60]}"


@pytest.mark.parametrize("guarantee", PROMISED, ids=lambda g: str(g)[:60])
def test_every_guarantee_has_a_property_and_a_breakage_that_it_finds(guarantee):
    assert any(guarantee.begins(words) for m in MUTATIONS for words in m.guarantees), (
        f"no mutation breaks: {guarantee}"
    )


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name[:60])
def test_every_breakage_can_be_made_and_names_a_test_that_exists(mutation):
    assert mutation.misfits(ROOT / "vitguard") == ""
    path, _, name = mutation.test.partition("::")
    text = (ROOT / "tests" / path).read_text()
    assert name.partition("[")[0] in {
        node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)
    }
    for words in mutation.guarantees:
        assert sum(g.begins(words) for g in PROMISED) == 1, f"{words} names no one guarantee"


def test_names_of_breakages_are_theirs_alone():
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS) >= 60


@pytest.mark.slow
def test_the_page_says_what_the_code_promises():
    page = (ROOT / "docs" / "guarantees.md").read_text()
    table = page.partition("<!-- table -->\n")[2].partition("\n<!-- end of table -->")[0]
    assert table == script.guarantees_table(), "run python benchmarks/mutations.py --pages docs"


def test_a_guarantee_ends_with_a_stop_and_none_is_none():
    text = "Title.\n\nGuarantees:\n    One thing\n    over two lines.\n    Another.\n\nArgs:\n"
    assert [str(g) for g in guarantees_in(text, "It")] == [
        "It: One thing over two lines.", "It: Another.",
    ]  # fmt: skip
    assert not list(guarantees_in("Title.\n\nGuarantees:\n    None: nothing.\n", "It"))
    assert not list(guarantees_in("Title.\n", "It"))
    assert Guarantee("It", "Another.").begins("It: An") and not Guarantee("It", "A.").begins("It")
    assert any(g.begins("ClientPrivacy: The clipped update") for g in guarantees_of(ClientPrivacy))
