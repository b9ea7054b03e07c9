"""Documentation runs: every python block of the README and the docs, in its own namespace."""

import re
from pathlib import Path

import pytest

from vitguard.errors import MissingExtra

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LONG = {"README.md-1": pytest.mark.slow}
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


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_local_links_and_pictures_exist(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
