"""What an audit is given in place of a model, or as arrays beside an update."""

import numpy as np
import pytest
import torch
from torch import nn

import vitguard as vg
from tests.fast import fast_for
from vitguard.errors import InputError
from vitguard.registry import parse_stack
from vitguard.threats.curious_server import CuriousServer
from vitguard.threats.malicious_server import MaliciousServer, parse_threat

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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "withhold", fast_for(["attention", ["attention"], ("attention",)], fast=["attention"])
)
def test_a_lone_selector_is_no_list_of_letters(small_vit, withhold):
    model, given = vit(small_vit), {"attacks": "position", "withhold": withhold}
    report = vg.audit(model, (IMAGES[:1], LABELS[:1]), **given)
    assert [f.verdict for f in report.findings] == ["leaks"]
    assert report.threat["withheld"] == ["attention"]
    update = vg.protect(vit(small_vit), []).update(IMAGES[:1], LABELS[:1])
    report = vg.audit_update(model, update, **given)
    assert report.threat["withheld"] == ["attention"]
    for server in (CuriousServer, MaliciousServer):
        assert server(withhold=withhold).withhold == ("attention",)
    assert parse_threat("malicious", withhold).withhold == ("attention",)


@pytest.mark.parametrize("selector", [None, 5, b"head", ["attention", "mlp"]])
def test_a_selector_that_is_no_text_is_refused_in_words(small_vit, selector):
    model = vit(small_vit)
    with pytest.raises(InputError, match=r"a selection as text, .*'attention/mlp'"):
        vg.Anatomy.of(model).select(selector, [n for n, _ in model.named_parameters()])
    with pytest.raises(InputError, match=r"a selection (as text|of parameters)"):
        vg.protect(model, [vg.EncryptedGradients(selector)])
    with pytest.raises(InputError, match="a selection as text"):
        vg.audit(model, (IMAGES, LABELS), attacks="position", withhold=[selector])


def test_a_lone_name_and_a_lone_note_are_no_letters(small_vit):
    model, one = vit(small_vit), (IMAGES[:1], LABELS[:1])
    report = vg.audit(model, one, attacks="position", names="cat.png", notes="of a cat")
    assert report.images == ("cat.png",) and report.notes == ("of a cat",)
    with pytest.raises(InputError, match="2 names, one for each image"):
        vg.audit(model, (IMAGES, LABELS), attacks="position", names="ab")


@pytest.mark.parametrize("generator", [0, 42, "cpu"])
def test_a_seed_is_no_generator(small_vit, generator):
    with pytest.raises(InputError, match=r"a torch\.Generator, got .*manual_seed"):
        vg.protect(vit(small_vit), "shuffle", generator=generator)
    with pytest.raises(InputError, match="an Anatomy, got 'timm'"):
        vg.protect(vit(small_vit), "shuffle", anatomy="timm")


def test_a_short_word_is_answered_by_the_setting_that_begins_so():
    with pytest.raises(InputError, match="Did you mean epsilon"):
        parse_stack("privacy:eps=8")
    with pytest.raises(InputError, match="Did you mean shuffle"):
        parse_stack("shuf")


def test_a_guard_is_not_looked_for_on_a_wrapper(small_vit):
    model = vit(small_vit)
    vg.protect(model, "shuffle")
    with pytest.raises(InputError, match=r"got DataParallel around it\. Give the model inside"):
        vg.Guard.of(nn.DataParallel(model))
