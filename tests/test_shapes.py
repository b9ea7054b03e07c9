"""VITGUARD_SHAPES=1 checks every annotation, in every module; CI sets it for the whole suite."""

import ast
import os
import sys
from pathlib import Path

import jaxtyping
import pytest
import torch

from vitguard.attacks.spectrum import frequencies

ROOT = Path(__file__).parent.parent
ON = os.environ.get("VITGUARD_SHAPES", "0") not in ("", "0")

needs_the_check = pytest.mark.skipif(not ON, reason="VITGUARD_SHAPES is not set")


@needs_the_check
def test_a_call_that_contradicts_its_annotation_fails():
    try:  # `pytest.raises` turns the check off
        frequencies(torch.zeros(4, 4, dtype=torch.long))
    except jaxtyping.TypeCheckError:
        return
    raise AssertionError("integers went through where the annotation says Float")


@needs_the_check
def test_a_function_inside_a_function_is_checked_where_it_is_first_made_and_then_costs_nothing():
    from tests import shapes

    def made():
        @shapes._sparing(shapes.checked)
        def inner(number: int) -> int:
            return number

        return inner

    first, *_, last = [made() for _ in range(shapes._ENOUGH + 1)]
    assert first(3) == last(3) == 3 and last("three") == "three"
    try:
        first("three")
    except jaxtyping.TypeCheckError:
        return
    raise AssertionError("a string went through where the annotation says int")


@needs_the_check
def test_every_module_in_use_is_checked_but_what_pytest_loads_as_a_plugin():
    from tests.shapes import UNCHECKED

    loaded = {n: m for n, m in sys.modules.items() if n.partition(".")[0] == "vitguard"}
    plain = {n for n, m in loaded.items() if "jaxtyping" not in type(m.__loader__).__module__}
    assert plain <= UNCHECKED and len(loaded) > 20


def test_every_protocol_can_be_asked_for_at_run_time():
    protocols = [
        node
        for file in sorted((ROOT / "vitguard").rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef) and "Protocol" in map(_last_name, node.bases)
    ]
    told = {p.name for p in protocols if "runtime_checkable" in map(_last_name, p.decorator_list)}
    assert protocols and {p.name for p in protocols} == told


def _last_name(node: ast.expr) -> str:
    node = node.value if isinstance(node, ast.Subscript) else node
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


@pytest.mark.skipif(ON, reason="the check was turned on in time")
def test_a_check_that_would_miss_modules_is_refused():
    pytest.importorskip("beartype")
    from tests import shapes

    with pytest.raises(pytest.UsageError, match=r"vitguard\.core"):
        shapes.install()


def test_ci_runs_the_whole_suite_with_it_on_both_pythons_at_both_ends_of_the_versions():
    script = (ROOT / ".ci" / "versions").read_text()
    assert "\nexport VITGUARD_SHAPES=1" in script
    (line,) = (line for line in script.splitlines() if " -m pytest" in line)
    assert '-m "not browser"' in line and "tests/" not in line  # slow ones too, all files
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert 'versions: ["lowest", "newest"]' in workflow
    assert workflow.count('python: ["3.11", "3.13"]') == 2
    assert ".ci/versions ${{ matrix.versions }} ${{ matrix.python }}" in workflow
