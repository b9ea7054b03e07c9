"""A package outside vitguard, one file each for a defense and an attack, as the docs show them."""

import ast
import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import drawn
from vitguard.audit import audit
from vitguard.cli.main import main
from vitguard.defenses.encryption import EncryptedGradients
from vitguard.guard import protect
from vitguard.plan import plan_report
from vitguard.registry import attack_types, defense_types, parse_attack, parse_stack
from vitguard.testing import contracts

DOCS = Path(__file__).parent.parent / "docs"
SMALL = (
    "vit_tiny_patch16_224:img_size=16,patch_size=4,embed_dim=96,depth=2,num_heads=4,num_classes=10"
)
PAGES = {"sign": "add-a-defense.md", "colour": "add-an-attack.md"}


def shown(page, language):
    """Return the first block of a page in a language."""
    return re.search(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.M | re.S)[1]


@pytest.fixture
def yours(tmp_path, monkeypatch):
    """The package `yours` of the docs, installed: its modules and its entry points."""
    (tmp_path / "yours").mkdir()
    (tmp_path / "yours" / "__init__.py").touch()
    points = []
    for name, page in PAGES.items():
        (tmp_path / "yours" / f"{name}.py").write_text(shown(page, "python"))
        toml = shown(page, "toml")
        group = re.search(r'entry-points\."(.*?)"', toml)[1]
        points.append(f"[{group}]\n" + re.search(r"^.* = .*$", toml, re.M)[0].replace('"', ""))
    info = tmp_path / "yours-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: yours\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("\n".join(points) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for types in (defense_types, attack_types):
        types.cache_clear()
    yield importlib.import_module("yours")
    for name in [n for n in sys.modules if n.split(".")[0] == "yours"]:
        del sys.modules[name]
    for types in (defense_types, attack_types):
        types.cache_clear()


def test_it_is_listed_and_read_from_the_command_line(yours, capsys):
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    assert "sign: Send only the sign" in listed and "mean-colour (closed-form)" in listed
    assert parse_stack("sign:scale=0.5")[0].scale == 0.5
    assert parse_attack("mean-colour") == attack_types()["mean-colour"]()


def test_it_keeps_the_contracts(yours):
    contracts.check_settings(defense_types()["sign"])
    contracts.check_settings(attack_types()["mean-colour"])
    contracts.check_attack(attack_types()["mean-colour"]())


@pytest.mark.slow
def test_it_is_audited_and_says_so_itself(yours, small_vit, photo, tmp_path):
    batch = photo, torch.tensor([3])
    report = audit(
        drawn(small_vit()), batch, defenses="sign:scale=0.5", attacks=["mean-colour", "position"]
    )
    found = {(f.defense, f.attack): f for f in report.findings}
    held = found["sign:scale=0.5", "position"]
    assert held.verdict == "inconclusive" and "picked out" in held.reason, held.reason
    assert found["none", "position"].verdict == "leaks"
    assert found["none", "mean-colour"].psnr is not None
    path = tmp_path / "report.json"
    arguments = ["--num-images", "1", "--defense", "sign", "--attack", "mean-colour"]
    html = ["--html", str(tmp_path / "report.html")]
    assert main(["audit", "--model", SMALL, *arguments, *html, "--json", str(path)]) == 0
    assert {f["defense"] for f in json.loads(path.read_text())["findings"]} == {"none", "sign"}


def test_attacks_know_from_its_traits_that_values_are_not_exact(yours, small_vit, observe, photo):
    assert not observe(small_vit(), photo, defenses="sign").traits.exact
    assert observe(small_vit(), photo).traits.exact


def test_the_plan_prints_what_it_says_remains(yours, capsys):
    plain, sealed = plan_report(SMALL, "attention"), plan_report(SMALL, "patch")
    assert "mean-colour" in plain.remaining() and "mean-colour" not in sealed.remaining()
    (said,) = (a for a in sealed.attacks if a.attack == "mean-colour")
    assert said.reason == "patch_embed.proj.weight is encrypted"
    assert main(["plan", "--model", SMALL, "--encrypt", "attention"]) == 0
    assert "mean-colour" in capsys.readouterr().out


def test_a_colour_alone_refuses_no_selection(yours, small_vit):
    model = small_vit()
    protect(model, [EncryptedGradients(select="plan")])


@pytest.mark.parametrize("page", PAGES.values())
def test_nothing_it_imports_begins_with_an_underscore(page):
    for node in ast.walk(ast.parse(shown(page, "python"))):
        if isinstance(node, ast.ImportFrom):
            parts = [*node.module.split("."), *(alias.name for alias in node.names)]
            assert not [p for p in parts if p.startswith("_")]
