"""VITGUARD_SHAPES=1 checks every annotation, in every module; CI sets it for the whole suite."""

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
