"""docs/security.md names a test for every promise, and each of them is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TABLE = [
    line for line in (ROOT / "docs/security.md").read_text().splitlines() if line.startswith("| ")
][1:]


@pytest.mark.parametrize("line", TABLE, ids=lambda line: line.split("|")[1].strip()[:60])
def test_every_promise_has_its_test(line):
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", line.split("|")[-2])
    assert named, "a promise without a test"
    for path, name in named:
        functions = {
            node.name
            for node in ast.parse((ROOT / path).read_text()).body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        }
        assert functions and (not name or name in functions)
