"""Three statements of `vitguard advise` for each of some models, verified by `audit`."""

import pytest
import torch

from tests.conftest import small_vit
from vitguard import data
from vitguard.advise import advise_report
from vitguard.audit import audit
from vitguard.models import build_model, load_checkpoint

TINY = {
    "class token": {},
    "mean of patches": {"class_token": False, "global_pool": "avg"},
    "registers, narrow": {"reg_tokens": 2, "embed_dim": 64, "num_heads": 2},
}
REAL = {
    "vit_small_patch16_224:num_classes=10": "",
    "vit_small_patch14_dinov2:img_size=112,num_classes=10": "dinov2_small_timm_fp16.safetensors",
}


def confirm(model):
    """Hold three statements against audits: exact at one image, and ended where it says."""
    stated = {a.attack: a for a in advise_report(model).attacks}
    size = tuple(data_size(model))

    def found(count, attack, defenses):
        few = count <= len(data.SAMPLE_NAMES)
        pixels = data.sample_images(size, count=count).pixels if few else data.decoys(count, size)
        batch = (pixels, torch.arange(count) % 10)
        report = audit(model, batch, defenses=defenses, attacks=[attack], batch_size=count)
        return report.findings[-1]

    position, span, gelu = (stated[n] for n in ("position", "span", "gelu-span"))
    assert position.exact_until == 1
    exact = found(1, "position", ())
    assert exact.verdict == "leaks" and exact.psnr.min > 60, exact
    under = found(1, "span", "positions:kind=frozen")
    assert (under.verdict == "leaks") >= span.exact, under
    assert (under.psnr.min > 60) is span.exact, under
    ended = found(gelu.ends_at, "gelu-span:seconds=5", "positions:kind=frozen")
    assert ended.verdict == "not applicable" and not ended.psnr, ended
    assert "tokens fill the spans" in ended.reason


def data_size(model):
    from vitguard.vit import Anatomy

    return Anatomy.of(model).image_size


@pytest.mark.slow
@pytest.mark.parametrize("changes", TINY.values(), ids=TINY)
def test_three_statements_of_a_small_model_are_what_the_audit_finds(changes):
    confirm(small_vit(**changes))


@pytest.mark.slow
@pytest.mark.parametrize("spec", REAL)
def test_three_statements_of_a_real_model_are_what_the_audit_finds(spec, data_folder):
    model = build_model(spec)
    if REAL[spec]:
        load_checkpoint(model, data_folder / "weights" / REAL[spec])
    confirm(model)


@pytest.mark.slow
def test_the_batch_below_the_one_that_ends_it_is_still_exact():
    """Two images of 17 tokens are 34 of 96: `gelu-span` proves patches of both.

    Of four, a token fits at positions that are not its own.
    """
    model = small_vit()
    stated = next(a for a in advise_report(model).attacks if a.attack == "gelu-span")
    assert (stated.exact_until, stated.ends_at) == (3, 6)
    four = advise_report(model, batch_size=4)
    (at_four,) = (a for a in four.attacks if a.attack == "gelu-span")
    assert at_four.applies and not at_four.exact and "not its own" in at_four.reason
    assert four.sentence().startswith("no attack gives whole images back by equations alone")
    batch = (data.decoys(4, (16, 16)), torch.arange(4))
    refused = audit(model, batch, defenses="positions:kind=frozen", attacks=["gelu-span"])
    assert refused.findings[-1].verdict == "not applicable"
    assert "not its own" in refused.findings[-1].reason
    images = data.sample_images((16, 16), count=2, classes=10)
    report = audit(
        model, (images.pixels, torch.tensor([1, 2])), defenses="positions:kind=frozen",
        attacks=["gelu-span:seconds=20"], batch_size=2,
    )  # fmt: skip
    assert report.findings[-1].verdict == "leaks"
