"""NVFlare's filter of tasks: crafted weights never reach the training."""

import math

import pytest
import torch

pytest.importorskip("nvflare", reason="needs the extra nvflare", exc_type=ImportError)

from nvflare.apis.dxo import DXO, DataKind, from_shareable

from tests.federated.test_nvflare import context
from tests.inspection.crafts import PUBLISHED
from tests.inspection.test_look import make
from vitguard.errors import InputError, Rejected, SuspiciousWeights
from vitguard.federated.nvflare import InspectFilter

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
MODEL = {
    "path": "timm.create_model",
    "args": {"model_name": "vit_tiny_patch16_224", "num_classes": 10, **SIZES},
}


def task(weights):
    return DXO(DataKind.WEIGHTS, data=dict(weights)).to_shareable()


def test_honest_tasks_pass_and_are_remembered_over_restarts(tmp_path):
    honest = make().state_dict()
    for number in range(3):  # a filter of its own each time, as after a restart
        passed = InspectFilter(MODEL).process(task(honest), context(tmp_path, "a", number=number))
        data = from_shareable(passed).data
        assert all(torch.equal(data[n], t) for n, t in honest.items())
    with pytest.raises(SuspiciousWeights, match="moved"):
        InspectFilter(MODEL).process(task(make(5).state_dict()), context(tmp_path, "a", number=3))
    InspectFilter(MODEL).process(task(make(5).state_dict()), context(tmp_path, "b", number=3))


@pytest.mark.parametrize("craft", PUBLISHED)
def test_tasks_with_crafted_weights_are_refused_in_one_line(craft, tmp_path):
    weights = PUBLISHED[craft](make())
    with pytest.raises(SuspiciousWeights, match="signs of a craft") as refused:
        InspectFilter(MODEL).process(task(weights), context(tmp_path, "a"))
    assert "\n" not in str(refused.value)
    InspectFilter(MODEL, limit=math.inf).process(task(weights), context(tmp_path, "a"))


def test_weights_of_another_model_and_limits_of_zero_are_refused(tmp_path):
    with pytest.raises(InputError):
        InspectFilter(MODEL).process(task({"strange": torch.zeros(2)}), context(tmp_path, "a"))
    with pytest.raises(InputError):
        InspectFilter(MODEL, limit=0.0)


@pytest.mark.parametrize("left", [b"{", b"[]", b'{"more": 1}', b"\xff"])
def test_a_memory_that_is_none_is_refused(tmp_path, left):
    InspectFilter(MODEL).process(task(make().state_dict()), context(tmp_path, "a"))
    (tmp_path / "a/job/vitguard/a-accepted.json").write_bytes(left)
    with pytest.raises(Rejected, match=r"accepted\.json"):
        InspectFilter(MODEL).process(task(make().state_dict()), context(tmp_path, "a"))
