"""The API pages show what users import, all of it, and nothing private."""

import re
from importlib import import_module
from pathlib import Path

import pytest

import vitguard

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("api*.md"))
TEXT = "\n".join(page.read_text() for page in PAGES)
SHOWN = re.findall(r"^::: (\S+)", TEXT, re.M)
MEMBERS = re.findall(r"^        - (\S+)", TEXT, re.M)


@pytest.mark.parametrize("name", vitguard.__all__)
def test_every_name_of_vitguard_is_on_an_api_page(name):
    assert {f"vitguard.{name}", f"vitguard.{name}.{name}"} & set(SHOWN)


@pytest.mark.parametrize(
    "home",
    ["vitguard.defenses.privacy", "vitguard.defenses.encryption", "vitguard.defenses.masking"],
)
def test_every_public_name_of_a_defense_with_parts_is_on_an_api_page(home):
    assert set(import_module(home).__all__) <= {*MEMBERS, *vitguard.__all__}


def test_every_public_name_of_the_flower_integration_is_on_an_api_page():
    pytest.importorskip("flwr", reason="needs vitguard[flower]")
    from vitguard.federated import flower

    assert set(flower.__all__) <= set(MEMBERS)


def test_no_api_page_shows_a_private_name():
    names = [*SHOWN, *MEMBERS]
    assert len(names) > 60
    assert not [name for name in names if re.search(r"(^|\.)_", name)]


def test_no_name_is_shown_twice():
    assert len(SHOWN) == len(set(SHOWN))


def test_docstrings_call_their_examples_by_the_name_that_the_pages_render_as_code():
    sources = {p: p.read_text() for p in (ROOT / "vitguard").rglob("*.py")}
    assert any(re.search(r"^ +Examples:$", text, re.M) for text in sources.values())
    assert not [str(p) for p, text in sources.items() if re.search(r"^ +Example:$", text, re.M)]


def test_the_citation_names_the_version_of_the_package():
    assert f"\nversion: {vitguard.__version__}\n" in (ROOT / "CITATION.cff").read_text()
