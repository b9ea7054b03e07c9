"""The audit: each verdict where it is due, and nothing that a broken attack could turn into one."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.fast import crossed
from vitguard import data
from vitguard.attacks.april import April
from vitguard.attacks.base import Attack
from vitguard.attacks.position import PositionInversion
from vitguard.attacks.span import SpanInversion
from vitguard.audit import LocalTraining, audit
from vitguard.audit.attempts import labels_overlap
from vitguard.audit.received import audit_update
from vitguard.core import Guess, Normalization
from vitguard.defenses.base import UpdateDefense
from vitguard.defenses.noise import GradientNoise
from vitguard.defenses.positions import FixedPositions
from vitguard.draws import Draws
from vitguard.errors import Incompatible, InputError, LeakFound, NotApplicable
from vitguard.guard import protect
from vitguard.metrics import patch_psnr, psnr

FROZEN = [FixedPositions("frozen")]


@dataclass(frozen=True)
class Fake(Attack):
    """Returns images that know nothing, or breaks, as told."""

    name: ClassVar[str] = "fake"
    family: ClassVar[str] = "closed-form"
    what: str = "grey"

    def run(self, view, generator):
        shape = (view.update.batch_size, *view.image_shape)
        if self.what == "grey":
            return Guess(torch.full(shape, 0.5))
        if self.what == "white noise":
            return Guess(torch.rand(shape, generator=generator))
        if self.what == "smooth noise":
            return Guess(smooth(shape, generator))
        if self.what == "photo":
            return Guess(data.sample_images(view.image_shape[1:]).pixels[-1:].clone())
        if self.what == "nan":
            return Guess(torch.full(shape, math.nan))
        if self.what == "shape":
            return Guess(torch.zeros(1, 3, 2, 2))
        if self.what == "error":
            raise RuntimeError("the solver did not converge\nand more")
        raise NotApplicable("by half") if view.settings else AssertionError(self.what)


def smooth(shape, generator):
    """Noise with the spectrum of photos."""
    noise = torch.randn(shape, generator=generator)
    down, across = torch.fft.fftfreq(shape[-2])[:, None], torch.fft.rfftfreq(shape[-1])
    frequency = (down.square() + across.square()).sqrt().clamp_min(1 / shape[-1])
    images = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency, s=shape[-2:])
    return (0.25 * images / images.std((1, 2, 3), keepdim=True) + 0.5).clamp(0, 1)


def run(model, pixels, attacks, **how):
    report = audit(model, (pixels, torch.arange(len(pixels))), attacks=attacks, **how)
    return {(f.defense, f.attack): f for f in report.findings}, report


def test_leaks_where_an_attack_comes_close(small_vit, photo):
    found, report = run(small_vit(), photo, [PositionInversion(), SpanInversion()], defenses=FROZEN)
    assert found["none", "position"].verdict == "leaks"
    assert found["none", "position"].control.verdict == "leaks"
    span = found["positions:kind=frozen", "span"]
    assert span.verdict == "leaks" and span.control.verdict == "leaks"
    assert span.patch_psnr.min > 90 and span.labels_correct == 1 and span.identified == 1
    assert span.gain == pytest.approx(span.patch_psnr.max - report.baseline.patch_psnr)
    assert report.gate(max_psnr=15) == 1 and report.gate(max_gain=6) == 1
    with pytest.raises(LeakFound):
        report.raise_if_leaks()


@dataclass(frozen=True)
class OnePatch(Attack):
    """Proves one patch (or claims to), and knows nothing of the rest."""

    name: ClassVar[str] = "one-patch"
    family: ClassVar[str] = "ladder"
    patch: tuple = ()

    def run(self, view, generator):
        images = torch.full((1, *view.image_shape), 0.5)
        (patch,) = self.patch
        images[0, :, : patch.shape[-2], : patch.shape[-1]] = patch
        verified = torch.zeros(1, 16, dtype=torch.bool)
        verified[0, 0] = True
        return Guess(images, verified=verified)


def test_a_patch_that_the_attack_proved_leaks_whatever_the_whole_image_scores(small_vit, photo):
    right = photo[0, :, 8:16, 8:16]
    found, report = run(small_vit(), photo, [OnePatch((right,))], defenses=FROZEN)
    finding = found["positions:kind=frozen", "one-patch"]
    assert finding.gain < 6 and finding.verdict == "leaks"
    assert "1 of 16 patches" in finding.reason and finding.details["recovered"] == 1 / 16
    assert report.gate(max_psnr=60) == 1  # a leak that no limit in dB sees
    found, _ = run(small_vit(), photo, [OnePatch((1 - right,))], defenses=FROZEN)
    assert found["positions:kind=frozen", "one-patch"].verdict == "inconclusive"


def test_resisted_where_the_control_leaks_and_the_defended_does_not(small_vit, photo):
    found, report = run(small_vit(), photo, [PositionInversion()], defenses=[GradientNoise(3.0)])
    finding = found["noise:scale=3.0", "position"]
    assert finding.verdict == "resisted" and finding.control.verdict == "leaks"
    assert finding.gain < 6
    assert report.gate(max_gain=6) == 0


@pytest.mark.slow
def test_on_a_cpu_matching_by_name_fits_the_budget_and_says_so(small_vit, photo, monkeypatch):
    from vitguard.attacks.matching import settings as matching

    monkeypatch.setattr(matching, "CPU_BUDGET", 1e9)
    report = audit(small_vit(), (photo, torch.tensor([3])), attacks=["gradvit:seconds=20"])
    (finding,) = report.findings
    assert finding.details["schedule"].startswith("shortened to fit the budget of a CPU: 8 ")
    assert "120,000" in finding.details["schedule"]


def test_blocked_where_a_tensor_is_not_there_names_it(small_vit, photo):
    found, report = run(small_vit(), photo, [PositionInversion()], defenses=FROZEN)
    finding = found["positions:kind=frozen", "position"]
    assert finding.verdict == "blocked" and "pos_embed" in finding.reason
    assert finding.psnr is None and finding.seconds is None
    assert report.gate(max_psnr=50) == 3


def test_withholding_blocks_too_but_not_the_control(small_vit, photo):
    found, _ = run(small_vit(), photo, [PositionInversion()], withhold=("position",))
    finding = found["none", "position"]
    assert finding.verdict == "blocked" and "withheld by" in finding.reason
    assert finding.control.verdict == "leaks"


def test_not_applicable_where_an_assumption_fails(small_vit, photo):
    found, report = run(small_vit(), photo, [April()], defenses=FROZEN)
    assert {f.verdict for f in found.values()} == {"not applicable"}
    assert report.gate(max_psnr=50) == 3


def test_inconclusive_where_the_control_does_not_leak_either(small_vit, photo):
    found, report = run(small_vit(), photo, [Fake("grey")], defenses=FROZEN)
    assert found["none", "fake"].verdict == "inconclusive"
    finding = found["positions:kind=frozen", "fake"]
    assert finding.verdict == "inconclusive" and "does not leak either" in finding.reason
    assert report.gate(max_psnr=200) == 3


@pytest.mark.parametrize("what", ["nan", "shape", "error"])
@pytest.mark.parametrize("beside", [(), (PositionInversion(),)])
def test_a_broken_attack_is_inconclusive_and_never_passes_a_gate(small_vit, photo, what, beside):
    found, report = run(small_vit(), photo, [Fake(what), *beside], defenses=FROZEN)
    for defense in ("none", "positions:kind=frozen"):
        finding = found[defense, "fake"]
        assert finding.verdict == "inconclusive" and not finding.conclusive
        assert ("converge" if what == "error" else "no usable image") in finding.reason
        assert "\n" not in finding.reason
    assert report.gate(max_psnr=200) == report.gate(max_gain=200) == 3


@dataclass(frozen=True)
class Sometimes(Attack):
    """Gives up under a defense on every image but the first; knows the truth without one."""

    name: ClassVar[str] = "sometimes"
    family: ClassVar[str] = "closed-form"

    def run(self, view, generator):
        if not view.settings:
            return PositionInversion().run(view, generator)
        if view.update.read("head.bias").argmin() == 0:
            return Guess(torch.full((1, *view.image_shape), 0.5))
        raise NotApplicable("not today")


@pytest.mark.slow
def test_some_batches_attacked_in_vain_and_some_not_at_all_is_no_resistance(small_vit, photos):
    found, report = run(small_vit(), photos[:3], [Sometimes()], defenses=FROZEN, batch_size=1)
    finding = found["positions:kind=frozen", "sometimes"]
    assert finding.verdict == "inconclusive" and finding.control.verdict == "leaks"
    assert "2 of 3 batches: not today" in finding.reason
    assert report.gate(max_psnr=200) == 3


def test_the_worst_image_decides_not_the_mean(small_vit, photos):
    @dataclass(frozen=True)
    class OneOfThree(Attack):
        name: ClassVar[str] = "one-of-three"
        family: ClassVar[str] = "closed-form"

        def run(self, view, generator):
            guess = PositionInversion().run(view, generator)
            known = guess.labels.tolist() == [1]
            return guess if known else replace(guess, images=torch.full_like(guess.images, 0.5))

    found, _ = run(small_vit(), photos[:3], [OneOfThree()], batch_size=1)
    finding = found["none", "one-of-three"]
    assert finding.verdict == "leaks" and finding.patch_psnr.median < 30
    assert finding.gain > 90  # of the one image that was found; 30 on average


BATCHES = [(1, 1), (5, 5), (4, 1)]


@pytest.mark.parametrize(
    ("what", "seeds", "batches"),
    [
        pytest.param(what, seeds, batches, marks=marks)
        for seeds, kinds in ((2, ["grey", "photo", "white noise", "smooth noise"]),
                             (6, ["white noise", "smooth noise"]))
        for what, batches, marks in (
            (*case.values, case.marks if seeds == 2 else pytest.mark.slow)
            for case in crossed(kinds, BATCHES)
        )
    ],
)  # fmt: skip
def test_guesses_that_know_nothing_are_never_a_leak(small_vit, photos, what, seeds, batches):
    model, (count, batch_size) = small_vit(depth=1), batches
    for seed in range(seeds):
        found, _ = run(model, photos[:count], [Fake(what)], batch_size=batch_size, seed=seed)
        assert found["none", "fake"].verdict == "inconclusive", seed


@pytest.mark.slow
def test_identification_by_chance_is_no_leak_but_by_merit_it_is(small_vit, photos):
    from vitguard.audit.attempts import Attempt
    from vitguard.audit.exposure import Facts
    from vitguard.audit.scale import Scale
    from vitguard.audit.verdicts import finding_of
    from vitguard.metrics import baseline, score

    level = baseline(photos, (4, 4))
    decoys = data.decoys(100, (16, 16), truth=photos)

    def verdict(guess, count):
        truths = photos[:count]
        scale = Scale(decoys, baseline(truths, (4, 4)), decoys)
        facts = Facts(tuple("abcde"[:count]), (4, 4), truths, scale=scale)
        scores = score(guess, truths, (4, 4), decoys=decoys)
        attempt = Attempt(facts, guess=Guess(guess), scores=scores)
        return finding_of("none", PositionInversion(), [attempt])

    faint = (0.5 + 0.1 * (photos - photos.mean((2, 3), keepdim=True))).clamp(0, 1)
    assert verdict(faint, 5).gain < 6
    assert verdict(faint, 5).verdict == "leaks"
    assert "5 of 5 images told from 100 decoys" in verdict(faint, 5).reason
    assert verdict(faint, 1).verdict == "inconclusive"
    assert level.psnr.shape == (5,)


def test_a_shuffled_truth_scores_the_cap_matched_and_little_raw(photos):
    truth = data.sample_images((32, 32), count=1).pixels
    generator = torch.Generator().manual_seed(0)
    pieces = truth.view(1, 3, 4, 8, 4, 8).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    pieces = pieces[:, torch.randperm(16, generator=generator)].unflatten(1, (4, 4))
    moved = pieces.permute(0, 3, 1, 4, 2, 5).reshape(truth.shape)
    assert patch_psnr(moved, truth, (8, 8)).item() == 200
    assert 5 < psnr(moved, truth).item() < 12


def test_moved_patches_are_a_leak(small_vit, photo):
    @dataclass(frozen=True)
    class Moves(Attack):
        name: ClassVar[str] = "moves"
        family: ClassVar[str] = "closed-form"

        def run(self, view, generator):
            guess = PositionInversion().run(view, generator)
            return replace(guess, images=guess.images.roll(4, -1).roll(8, -2))

    found, _ = run(small_vit(), photo, [Moves()])
    finding = found["none", "moves"]
    assert finding.verdict == "leaks" and finding.psnr.max < 20 < 90 < finding.patch_psnr.max


@pytest.mark.slow
def test_the_same_seed_gives_the_same_report_for_any_number_of_workers(small_vit, photos):
    model = small_vit(proj_drop_rate=0.3)
    stacks = {"noise": [GradientNoise(0.01)], "random": [FixedPositions("random")]}
    how = {"defenses": stacks, "batch_size": 1, "withhold": ("token",)}
    attacks = [PositionInversion(), SpanInversion(), Fake("white noise")]

    def numbers(**more):
        report = run(model, photos[:3], attacks, **how, **more)[1].to_json()
        return [{k: v for k, v in f.items() if k != "seconds"} for f in report["findings"]]

    torch.manual_seed(1)
    first = numbers(seed=4)
    state = torch.get_rng_state()
    assert numbers(seed=4, workers=3) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert numbers(seed=5) != first


class Peek(UpdateDefense):
    """Replaces the update by its own secret draw."""

    name = "peek"

    def settings(self):
        return {}

    def spec(self):
        return self.name

    def seal(self, update, anatomy, draws):
        return replace(update, tensors={"head.bias": draws.normal((10,)).float()})


@pytest.mark.slow
def test_an_attack_is_not_given_the_victims_draws(small_vit, photos):
    seen = []

    @dataclass(frozen=True)
    class Draw(Attack):
        name: ClassVar[str] = "draw"
        family: ClassVar[str] = "closed-form"

        def run(self, view, generator):
            if "peek" in view.settings:
                mine = Draws(generator).normal((10,)).float()  # as the victim's defense draws
                seen.append((view.update.read("head.bias"), mine))
            return Guess(torch.full((1, *view.image_shape), 0.5))

    for seed in range(3):
        run(small_vit(), photos[:2], [Draw()], defenses=[Peek()], batch_size=1, seed=seed)
    assert len(seen) == 6
    secrets, draws = ({tuple(x.tolist()) for x in side} for side in zip(*seen, strict=True))
    assert len(secrets) == len(draws) == 6 and not secrets & draws


def test_differences_are_audited_and_named(small_vit, photo):
    training = LocalTraining(0.1, 3)
    found, report = run(
        small_vit(), photo, [PositionInversion(), SpanInversion()], training=training
    )
    assert found["none", "position"].verdict == "leaks"
    assert found["none", "span"].verdict == "leaks"  # to first order
    assert report.update == "difference after 3 sgd steps at rate 0.1"


def test_the_model_is_copied_and_left_alone(small_vit, photo):
    model = small_vit().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run(model, photo, [PositionInversion()], defenses=FROZEN, training=LocalTraining(0.1))
    assert not model.training and not hasattr(model, "vitguard")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.slow
def test_other_precisions_and_grey_images_are_audited(small_vit, photo):
    found, _ = run(small_vit().double(), photo, [PositionInversion()])
    assert found["none", "position"].psnr.max > 140
    found, _ = run(small_vit().bfloat16(), photo, [PositionInversion()])
    assert found["none", "position"].verdict == "leaks"
    grey = photo.mean(1, keepdim=True)
    found, _ = run(small_vit(in_chans=1), grey, [PositionInversion()])
    assert found["none", "position"].verdict == "leaks"


LABELS = torch.tensor([0])


@pytest.mark.parametrize(
    ("pixels", "labels", "how"),
    [
        (torch.full((1, 3, 16, 16), math.nan), LABELS, {}),
        (torch.full((1, 3, 16, 16), 1.5), LABELS, {}),
        (torch.full((1, 3, 16, 16), -0.5), LABELS, {}),
        (torch.zeros(1, 3, 16, 20), LABELS, {}),
        (torch.zeros(3, 16, 16), LABELS, {}),
        (torch.zeros(0, 3, 16, 16), LABELS[:0], {}),
        (torch.zeros(1, 3, 16, 16), torch.tensor([10]), {}),
        (torch.zeros(1, 3, 16, 16), torch.tensor([-1]), {}),
        (torch.zeros(1, 3, 16, 16), torch.tensor([0, 1]), {}),
        (torch.zeros(2, 3, 16, 16), torch.tensor([0, 1]), {"batch_size": 3}),
        (torch.zeros(2, 3, 16, 16), torch.tensor([0, 1]), {"batch_size": 0}),
        (torch.zeros(1, 3, 16, 16), LABELS, {"attacks": "spam"}),
        (torch.zeros(1, 3, 16, 16), LABELS, {"defenses": "spam"}),
        (torch.zeros(1, 3, 16, 16), LABELS, {"withhold": ("spam",)}),
        (torch.zeros(1, 3, 16, 16), LABELS, {"defenses": {"none": FROZEN}}),
    ],
)
def test_bad_input_is_refused(small_vit, pixels, labels, how):
    with pytest.raises(InputError):
        audit(small_vit(), (pixels, labels), **{"attacks": [PositionInversion()], **how})


BATCH = (torch.full((2, 3, 16, 16), 0.5), torch.tensor([0, 1]))


def loader(size):
    return DataLoader(TensorDataset(*BATCH), batch_size=size)


@pytest.mark.parametrize(
    ("batch", "how", "said"),
    [
        (BATCH[0], {}, r"batch=\(images, labels\).*got Tensor"),
        (torch.zeros(3, 3, 16, 16), {}, r"batch=\(images, labels\).*got Tensor"),
        (loader(1), {}, "got DataLoader.*next"),
        (loader(2), {}, "got DataLoader.*next"),
        ((BATCH[0], None), {}, "got Tensor and NoneType"),
        ((BATCH[0], "ab"), {}, "got Tensor and str"),
        ((BATCH[0], [0.5, 1.0]), {}, "class indices"),
        ((BATCH[0] * 255, BATCH[1]), {}, r"Divide by 255\.$"),
        (((BATCH[0] * 255).byte().numpy(), BATCH[1]), {}, r"Divide by 255\.$"),
        ((BATCH[0] * 255 - 1, BATCH[1]), {}, r"Divide by 255\.$"),
        ((BATCH[0] - 0.6, BATCH[1]), {}, "normalization="),
        ((BATCH[0] * 4, BATCH[1]), {}, "normalization="),
        (BATCH, {"defenses": [FixedPositions]}, "Expected defenses, got <class"),
        (BATCH, {"defenses": [FROZEN, FROZEN]}, "as {name: stack}"),
        (BATCH, {"defenses": None}, "Expected defenses, got None"),
        (BATCH, {"defenses": {"a": [5]}}, "Expected defenses, got 5"),
        (BATCH, {"defenses": {"none": "noise"}}, "names of their own"),
        (BATCH, {"defenses": {1: "noise", "1": "shuffle"}}, "names of their own, got 1 names of 2"),
        (BATCH, {"attacks": ["position", 5]}, "Expected attacks, got 5"),
        (BATCH, {"attacks": [SpanInversion]}, "instances, not classes"),
        (BATCH, {"attacks": None}, "Expected attacks, got None"),
        (BATCH, {"model": "vit_tiny_patch16_224"}, r"nn\.Module, got 'vit_tiny.*build_model"),
    ],
)
def test_what_a_newcomer_gives_is_one_clear_error(small_vit, batch, how, said):
    how = {"attacks": [PositionInversion()], "model": small_vit(depth=1), **how}
    with pytest.raises(InputError, match=said):
        audit(batch=batch, **how)


USUAL = {
    "batch": BATCH, "defenses": FROZEN, "attacks": [PositionInversion()], "batch_size": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def usual(small_vit):
    return audit(small_vit(depth=1), **USUAL)


@pytest.mark.parametrize(
    "how",
    [
        {"defenses": FROZEN[0]},
        {"defenses": tuple(FROZEN)},
        {"defenses": "positions:kind=frozen"},
        {"defenses": {"positions:kind=frozen": "positions:kind=frozen"}},
        {"defenses": {"positions:kind=frozen": FROZEN[0], "none": "none"}},
        {"batch": (BATCH[0].tolist(), [0, 1])},
        {"batch": [BATCH[0].double().numpy(), BATCH[1].numpy()]},
        {"batch": (BATCH[0].numpy(), BATCH[1].numpy().astype("uint16"))},
        {"attacks": PositionInversion()},
        {"attacks": "position"},
    ],
)
def test_every_form_of_the_same_input_gives_the_same_report(small_vit, usual, how):
    given = audit(small_vit(depth=1), **{**USUAL, **how})
    assert [replace(f, seconds=None) for f in given.findings] == [
        replace(f, seconds=None) for f in usual.findings
    ]


def test_weights_that_are_not_finite_and_stacks_that_cannot_work_are_refused(small_vit, photo):
    model = small_vit()
    with torch.no_grad():
        model.head.bias[0] = math.nan
    with pytest.raises(InputError, match=r"head\.bias"):
        run(model, photo, [PositionInversion()])
    with pytest.raises(Incompatible):
        run(small_vit(), photo, [PositionInversion()], defenses="positions+withheld")


def test_a_configuration_called_control_is_not_mixed_up_with_the_control(small_vit, photo):
    found, _ = run(small_vit(), photo, [PositionInversion()], defenses={"control": FROZEN})
    assert found["control", "position"].verdict == "blocked"
    assert found["none", "position"].verdict == "leaks"


@pytest.mark.parametrize(
    ("guess", "truth", "share"),
    [
        ([1, 2, 2], [2, 1, 2], 1.0),
        ([1, 1, 1], [2, 1, 2], 1 / 3),
        ([0, 1, 2, 2, 1, 0], [2, 1, 2], None),
        ([-1, 1, 2], [2, 1, 2], None),
    ],
)
def test_labels_are_compared_as_multisets_of_the_same_size(guess, truth, share):
    assert labels_overlap(torch.tensor(guess), torch.tensor(truth)) == share


def made_update(model, pixels, **how):
    guard = protect(model, [])
    update = guard.update(Normalization().apply(pixels), torch.arange(len(pixels)), **how)
    guard.remove()
    return update


@pytest.mark.slow
def test_a_saved_update_leaks_where_the_guess_reproduces_it(small_vit, photo, tmp_path):
    from vitguard.core import Update

    model = small_vit()
    made_update(model, photo).save(tmp_path / "u")
    update = Update.load(tmp_path / "u")
    report = audit_update(
        model, update, attacks=[PositionInversion()], normalization=Normalization()
    )
    found = {f.defense: f for f in report.findings}
    assert found["update"].verdict == "leaks" and found["update"].details["update_error"] < 0.05
    assert found["none"].verdict == "leaks"
    wrong = audit_update(model, update, attacks=[Fake("grey")], normalization=Normalization())
    assert wrong.findings[-1].verdict == "inconclusive"


@pytest.mark.slow
@pytest.mark.parametrize("what", ["nan", "shape", "error"])
def test_a_broken_attack_on_a_saved_update_is_inconclusive(small_vit, photo, what):
    model = small_vit()
    update = made_update(model, photo)
    for truth in (None, photo):
        report = audit_update(model, update, attacks=[Fake(what)], truth=truth)
        assert [f.verdict for f in report.findings] == ["inconclusive", "inconclusive"]
        assert report.gate(max_psnr=200) == 3


@pytest.mark.slow
def test_a_saved_update_with_its_truth_is_scored(small_vit, photo):
    model = small_vit()
    report = audit_update(
        model, made_update(model, photo), attacks=[PositionInversion()], truth=photo,
        normalization=Normalization(), defenses="withheld", withhold=("head",),
    )  # fmt: skip
    assert report.findings[-1].verdict == "leaks" and report.findings[-1].psnr.max > 90
    with pytest.raises(InputError, match="images behind the update"):
        audit_update(model, made_update(model, photo), truth=photo.repeat(2, 1, 1, 1))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: {**t, "stranger": torch.zeros(1)},
        lambda t: {**t, "cls_token": torch.zeros(1)},
        lambda t: {**t, "cls_token": t["cls_token"] * math.nan},
    ],
)
def test_a_saved_update_of_another_model_is_refused(small_vit, photo, spoil):
    model = small_vit()
    update = made_update(model, photo)
    with pytest.raises(InputError):
        audit_update(model, replace(update, tensors=spoil(dict(update.tensors))))


@pytest.mark.slow
def test_an_update_without_a_readable_tensor_proves_nothing(small_vit, photo):
    model = small_vit()
    update = made_update(model, photo)
    empty = replace(update, tensors={k: torch.zeros_like(t) for k, t in update.tensors.items()})
    report = audit_update(model, empty, attacks=[Fake("grey"), PositionInversion()])
    assert not any(f.verdict == "leaks" for f in report.findings if f.defense == "update")
    with pytest.raises(InputError, match="tensors of the model, plain or sealed, got none"):
        audit_update(model, replace(update, tensors={}), attacks="position")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"names": ["a"] * 3}, r"\d names?, one for each image, got 3"),
        ({"seed": "a"}, r"seed as a whole number of at least 0 and below 2\*\*63, got 'a'"),
        ({"seed": -1}, r"seed as a whole number of at least 0 and below 2\*\*63, got -1"),
        ({"seed": 1.5}, "seed as a whole number"),
    ],
)
def test_names_and_seeds_that_fit_nothing_are_refused_in_words(small_vit, photo, how, said):
    model = small_vit().train()
    with pytest.raises(InputError, match=said):
        audit(model, (photo, torch.tensor([1])), attacks="position", **how)
    update = protect(small_vit().train(), []).update(photo, torch.tensor([1]))
    with pytest.raises(InputError, match=said):
        audit_update(model, update, attacks="position", **how)


@pytest.mark.slow
def test_a_seed_of_numpy_is_one(small_vit, photo, unchecked):
    batch = photo, torch.tensor([1])
    seeds = 3, np.int64(3)
    found = [audit(small_vit(), batch, attacks="position", seed=s).to_json() for s in seeds]
    assert [one["seed"] for one in found] == [3, 3]
