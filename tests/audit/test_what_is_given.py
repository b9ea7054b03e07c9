"""What an audit is given in place of a model, or as arrays beside an update."""

import numpy as np
import pytest
import torch
from torch import nn

import vitguard as vg
from vitguard.errors import InputError

IMAGES, LABELS = torch.rand(2, 3, 32, 32), torch.tensor([1, 2])


def vit(small_vit):
    return small_vit(img_size=32, patch_size=8, depth=1)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_a_wrapped_model_is_told_from_one_that_is_no_vision_transformer(small_vit, wrap):
    with pytest.raises(InputError, match=r"bare model, got \w+ around it. Give the model inside"):
        vg.audit(wrap(vit(small_vit)), (IMAGES, LABELS), attacks="position")
    update = vg.Update({"head.bias": torch.ones(10)})
    with pytest.raises(InputError, match="bare model"):
        vg.audit_update(wrap(vit(small_vit)), update, attacks="position")


def test_a_guard_is_no_round(small_vit):
    guard = vg.protect(vit(small_vit), "shuffle")
    with pytest.raises(InputError, match=r"got a Guard\. Audit its stack"):
        vg.audit(guard, (IMAGES, LABELS))


def test_truth_and_labels_may_be_arrays(small_vit):
    guard = vg.protect(vit(small_vit), [])
    update, model = guard.update(IMAGES, LABELS), guard.public_model()

    def told(truth, labels):
        report = vg.audit_update(model, update, attacks="position", truth=truth, labels=labels)
        (found,) = [f for f in report.findings if f.defense == "update"]
        return found.psnr

    assert told(IMAGES.numpy(), np.array([1, 2])) == told(IMAGES, LABELS)
    for wrong in ([1, 20], [0.5, 1.0], 3, [[1], [2]]):
        with pytest.raises(InputError, match=r"labels|class indices"):
            told(IMAGES, wrong)
    with pytest.raises(InputError, match="truth as a tensor or an array, got str"):
        told("photo.png", None)


def test_a_gate_asks_for_a_number(small_vit):
    report = vg.audit(vit(small_vit), (IMAGES, LABELS), attacks="position")
    with pytest.raises(InputError, match="max_psnr as a finite number of dB, got '15'"):
        report.raise_if_leaks(max_psnr="15")


@pytest.mark.parametrize("path", ["0", "0.0", "net.0"])
def test_the_part_to_protect_is_written_as_python_reads_it(small_vit, path):
    holder = vit(small_vit)
    for part in reversed(path.split(".")):
        inside, holder = holder, nn.Module() if not part.isdecimal() else nn.Sequential()
        holder.add_module(part, inside)
    with pytest.raises(InputError) as caught:
        vg.protect(holder, "shuffle")
    written = str(caught.value).partition("protect(")[2].partition(",")[0]
    assert vg.Anatomy.of(eval(written, {"model": holder}))
