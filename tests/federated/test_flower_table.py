"""The table of faults in the docs: every fault has a row, and every row a test that is there."""

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = (HERE.parents[1] / "docs" / "flower.md").read_text()
ROWS = dict(re.findall(r"^\| ([^|]+?) \| [^|]+ \| `(test_[^`]+)` \|$", PAGE, re.M))
FAULTS = {
    "the client raises", "the client times out", "garbage", "NaN", "infinity", "another shape",
    "other keys of the state dict", "no metrics", "another model", "an old round twice",
    "a wrong key", "weight 0", "weight -1", "weight 1e9", "plain weights in place of ciphertext",
    "no mod at all", "mod without attach", "two clients with one id", "too few clients",
    "a client that comes back after two rounds", "the server restarts between rounds",
    "the client's process restarts in every round",
}  # fmt: skip


def named():
    """The tests of Flower by name, each with the text that chooses its cases."""
    found = {}
    for file in HERE.glob("test_flower*.py"):
        text = file.read_text()
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found[node.name] = text
    return found


def test_every_fault_has_a_row_and_every_row_a_test():
    assert ROWS.keys() >= FAULTS and len(ROWS) > len(FAULTS)
    found = named()
    for fault, name in ROWS.items():
        function, _, case = name.partition("[")
        assert function in found, f"{fault}: there is no {function}"
        if case:
            assert re.search(rf"\b{re.escape(case.rstrip(']'))}\b", found[function]), name


def test_the_page_lists_every_fault_of_a_reply_that_is_tested():
    from tests.federated.test_flower import FAULTS as SPOILED

    covered = {n.partition("[")[2].rstrip("]") for n in ROWS.values() if "faulty_client[" in n}
    assert covered | {"no weight", "weight NaN"} == set(SPOILED)


def test_the_page_adds_at_most_five_lines_to_an_app():
    added = [
        len(re.findall(r"^\+", block, re.M))
        for block in re.findall(r"^```diff\n(.*?)^```", PAGE, re.M | re.S)
    ]
    assert len(added) == 2 and max(added) <= 5
