"""A file that a matching run cannot go on from says so, and what to do."""

import pytest
import torch

from vitguard.attacks.matching.checkpoint import load_run, save_run
from vitguard.errors import InputError

IDENTITY = {"attack": "dlg", "seed": 0}


def saved(path, state):
    torch.save(state, path)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b"noise"),
        lambda path: path.write_bytes(b""),
        lambda path: path.mkdir(),
        lambda path: saved(path, torch.nn.Linear(1, 1)),
        lambda path: saved(path, torch.nn.Linear(1, 1).state_dict()),
        lambda path: saved(path, [1, 2]),
        lambda path: saved(path, {"identity": 5}),
        lambda path: saved(path, {"identity": IDENTITY, "restarts": []}),
    ],
)
def test_a_file_that_is_no_saved_run_is_one_clear_line(tmp_path, write):
    write(tmp_path / "run.pt")
    with pytest.raises(
        InputError, match=r"a saved run, got .*run\.pt .*Give another file"
    ) as caught:
        load_run(tmp_path / "run.pt", IDENTITY, [])
    assert not any(word in str(caught.value) for word in ("\x1b", "weights_only", "\n"))


def test_a_run_of_another_seed_names_what_differs(tmp_path):
    save_run(tmp_path / "run.pt", IDENTITY, [], 7)
    assert load_run(tmp_path / "run.pt", IDENTITY, []) == 7
    with pytest.raises(InputError, match=r"another seed.*Give another file"):
        load_run(tmp_path / "run.pt", {**IDENTITY, "seed": 1}, [])
