"""Documentation runs: every python block of the README and the docs, in its own namespace."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import vitguard
from vitguard.errors import MissingExtra

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LONG = dict.fromkeys(
    (
        "README.md-1",
        "encryption.md-0",
        "exact-attacks.md-0",
        "federated.md-2",
        "flower.md-0",
        "nvflare.md-0",
        "testing.md-2",
    ),
    pytest.mark.slow,
)
BLOCKS = [
    pytest.param(code, id=f"{page.name}-{i}", marks=LONG.get(f"{page.name}-{i}", ()))
    for page in PAGES
    for i, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S))
]


@pytest.mark.parametrize("code", BLOCKS)
def test_python_block_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        exec(compile(code, "block", "exec"), {"__name__": "block"})
    except MissingExtra as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("code", [pytest.param(b.values[0], id=b.id) for b in BLOCKS])
def test_python_block_imports_and_calls_what_there_is(code):
    """Also of the blocks that are too long to run in the fast suite."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vitguard"):
            try:
                module = importlib.import_module(node.module)
            except (MissingExtra, ImportError) as missing:
                pytest.skip(str(missing))
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                assert hasattr(module, alias.name) or importlib.import_module(name)
        if isinstance(node, ast.Attribute) and _is_vitguard(node.value):
            assert hasattr(vitguard, node.attr), f"there is no vg.{node.attr}"
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and _is_vitguard(node.func.value)
        ):
            taken = inspect.signature(getattr(vitguard, node.func.attr)).parameters
            given = {k.arg for k in node.keywords if k.arg}
            assert given <= set(taken), f"vg.{node.func.attr} takes no {given - set(taken)}"


def _is_vitguard(node):
    return isinstance(node, ast.Name) and node.id in ("vg", "vitguard")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_local_links_and_pictures_exist(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
