"""Assertions hold where they should, fail on a broken defense, and are never green for nothing."""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from vitguard.core import Batch, Update
from vitguard.defenses.base import Installed, ModelDefense
from vitguard.defenses.privacy import DifferentialPrivacy, one_run_audit
from vitguard.defenses.privacy.accounting import gaussian_epsilon
from vitguard.errors import Inconclusive, InputError, Unprotected
from vitguard.guard import protect
from vitguard.testing import (
    assert_checkpoint_compatible,
    assert_epsilon_not_exceeded,
    assert_eval_unchanged,
    assert_fails_closed,
    assert_not_reconstructable,
    assert_removable,
    assert_round_trip,
    assert_sealed,
    assert_sensitivity,
)
from vitguard.testing.noted import drain


class Leaves(Installed):
    """Adds to the output in eval mode, and stays after remove()."""

    def uninstall(self, model):
        pass


@dataclass(frozen=True)
class Broken(ModelDefense):
    """Guarantees: None."""

    name: ClassVar[str] = "broken"
    rename: bool = False

    def install(self, model, anatomy, draws):
        model.register_forward_hook(lambda module, args, out: out + 1e-6)
        if self.rename:
            model.head2 = model.head
        return Leaves()


@dataclass(frozen=True)
class Touches(ModelDefense):
    """Guarantees: None."""

    name: ClassVar[str] = "touches"
    what: str = "state"

    def install(self, model, anatomy, draws):
        if self.what == "state":
            model.register_state_dict_post_hook(lambda *_: None)
        elif self.what == "loads":
            model.blocks[0].register_load_state_dict_pre_hook(lambda *_: None)
        elif self.what == "parameter":
            model.head.weight.register_hook(lambda gradient: gradient * 0)
        elif self.what == "frozen":
            model.head.weight.requires_grad_(False)
        elif self.what == "mode":
            model.blocks.eval()
        elif self.what == "attribute":
            model.last_draw = torch.zeros(1)
        elif self.what == "setting":
            model.blocks[0].attn.fused_attn = not model.blocks[0].attn.fused_attn
        elif self.what == "everywhere":
            register_module_forward_hook(lambda *_: None)
        elif self.what == "method":
            model.blocks[0].attn.forward = model.blocks[0].attn.forward
        elif self.what == "weights":
            with torch.no_grad():
                model.head.weight.mul_(2)
        return Leaves()


@pytest.fixture(scope="module")
def tiny(small_vit):
    return small_vit(depth=1)


def test_an_image_behind_too_little_noise_fails_with_numbers_and_a_picture(
    tiny, photo, tmp_path, monkeypatch
):
    monkeypatch.setenv("VITGUARD_PICTURES", str(tmp_path))
    with pytest.raises(AssertionError, match=r"dB matched-patch PSNR.*knowing nothing") as caught:
        assert_not_reconstructable(tiny, photo, defenses="noise:scale=1e-7", attacks="position")
    path = Path(str(caught.value).rpartition("Picture: ")[2])
    assert path.parent == tmp_path and path.read_bytes().startswith(b"\x89PNG")


def test_without_the_defense_it_fails(tiny, photo, tmp_path, monkeypatch):
    monkeypatch.setenv("VITGUARD_PICTURES", str(tmp_path))
    with pytest.raises(AssertionError, match="There is no defense"):
        assert_not_reconstructable(tiny, photo, defenses="none", attacks="position")


@pytest.mark.parametrize("gain", [6.5, float("inf"), float("nan")])
def test_a_limit_above_which_every_verdict_says_leaks_is_refused(tiny, photo, gain):
    with pytest.raises(InputError, match="max_gain of at most 6 dB"):
        assert_not_reconstructable(tiny, photo, defenses="noise:scale=10", max_gain=gain)


def test_strong_noise_holds_beside_a_control_that_leaks(tiny, photo):
    report = assert_not_reconstructable(tiny, photo, defenses="noise:scale=10", attacks="position")
    assert {f.verdict for f in report.findings if not f.defended} == {"leaks"}


def test_what_is_no_update_or_no_sum_is_told_and_a_sum_in_one_place_is_read_each_time():
    for assertion in (assert_round_trip, lambda given: assert_sealed(given, ["a"])):
        with pytest.raises(InputError, match=r"vitguard.Update, got dict"):
            assertion({"a": torch.ones(4)})
    with pytest.raises(InputError, match="one flat tensor, got list"):
        assert_sensitivity(lambda chosen: [1.0], 3, clip=1.0)
    place = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(AssertionError, match="moves the sum by 1"):
        assert_sensitivity(lambda chosen: place.fill_(len(chosen)), 3, clip=0.5)


@pytest.mark.slow
def test_an_attack_that_fails_on_the_control_is_inconclusive(tiny, photos):
    with pytest.raises(Inconclusive, match="All 3 images went into one update: try batch_size=1"):
        assert_not_reconstructable(
            tiny, photos[:3], defenses="noise:scale=1", attacks="dlg:iterations=1"
        )
    assert not issubclass(Inconclusive, AssertionError)


@pytest.mark.slow
@pytest.mark.parametrize("given", [list, iter])
def test_each_attack_that_is_named_must_work_on_the_control(tiny, photo, given):
    """One that works makes up for no other that was asked for."""
    attacks = given(["position", "dlg:iterations=1"])
    with pytest.raises(Inconclusive, match="dlg does not work on the undefended model"):
        assert_not_reconstructable(tiny, photo, defenses="noise:scale=10", attacks=attacks)


@pytest.mark.parametrize("stack", ["positions:kind=frozen", "shuffle", "privacy:noise=1"])
def test_sound_stacks_keep_eval_keys_and_architecture(tiny, photo, stack):
    assert_eval_unchanged(tiny, photo, defenses=stack)
    assert_checkpoint_compatible(tiny, defenses=stack)
    assert_removable(tiny, defenses=stack)


def test_a_defense_that_acts_in_eval_mode_or_stays_is_found(tiny, photo):
    with pytest.raises(AssertionError, match="10 of 10 logits, by up to 1"):
        assert_eval_unchanged(tiny, photo, defenses=[Broken()])
    with pytest.raises(AssertionError, match="does not undo broken"):
        assert_removable(tiny, defenses=[Broken()])
    with pytest.raises(AssertionError, match="changes 2 state-dict keys"):
        assert_checkpoint_compatible(tiny, defenses=[Broken(rename=True)])


def test_nothing_to_test_is_inconclusive(tiny, photo):
    with pytest.raises(Inconclusive, match="got none"):
        assert_eval_unchanged(tiny, photo, defenses=[])
    blind = copy.deepcopy(tiny)
    torch.nn.init.zeros_(blind.head.weight)
    with pytest.raises(Inconclusive, match="does not depend on the images"):
        assert_eval_unchanged(blind, photo, defenses="shuffle")


def sums(model, photos, clip):
    defense, labels = DifferentialPrivacy(noise=1.0, clip=clip), torch.arange(len(photos))

    def total(indices):
        if not indices:
            return torch.zeros(1)
        batch = Batch(photos[indices], labels[indices])
        guard = protect(copy.deepcopy(model), [defense])
        with guard.rehearsing():
            parts = defense.clipped_sum(guard.model, torch.nn.functional.cross_entropy, batch)
        return torch.cat([t.flatten() for t in parts.values()])

    return total


@pytest.mark.slow
def test_sensitivity_holds_at_the_clip_fails_above_and_is_inconclusive_below(tiny, photos):
    pixels = photos[:3] * 2 - 1
    assert_sensitivity(sums(tiny, pixels, 0.1), 3, clip=0.1)
    with pytest.raises(AssertionError, match="2 times as far"):
        assert_sensitivity(sums(tiny, pixels, 0.1), 3, clip=0.05)
    with pytest.raises(Inconclusive, match="No example reaches the clip"):
        assert_sensitivity(sums(tiny, pixels, 1e6), 3, clip=1e6)
    with pytest.raises(AssertionError):
        assert_sensitivity(lambda indices: torch.tensor([float("nan")]), 3, clip=1.0)


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan"), float("inf")])
def test_a_clip_that_is_none_is_no_bound(clip):
    with pytest.raises(InputError, match="a finite clip above 0"):
        assert_sensitivity(lambda indices: torch.zeros(1), 3, clip=clip)
    with pytest.raises(InputError, match="at least one example, got 0"):
        assert_sensitivity(lambda indices: torch.zeros(1), 0, clip=1.0)


@pytest.mark.parametrize("left_out", range(3))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sum_that_is_not_finite_without_one_example_fails_whichever_it_is(left_out, value):
    def total(indices):
        return torch.tensor([value if left_out not in indices else float(len(indices))])

    with pytest.raises(AssertionError, match="One example moves the sum by"):
        assert_sensitivity(total, 3, clip=1.0)


def gaussian(noise, seen=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda included: seen * included + noise * float(torch.randn((), generator=generator))


def test_canaries_hold_a_claim_break_a_false_one_and_say_when_they_see_nothing():
    claim = gaussian_epsilon(1 / 0.2, 1e-5)
    assert_epsilon_not_exceeded(gaussian(0.2), epsilon=claim, delta=1e-5)
    with pytest.raises(AssertionError, match="prove epsilon of at least"):
        assert_epsilon_not_exceeded(gaussian(0.1), epsilon=claim, delta=1e-5)
    with pytest.raises(Inconclusive, match="sees the canary"):
        assert_epsilon_not_exceeded(gaussian(0.2, seen=0.0), epsilon=claim, delta=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_release_that_is_now_and_then_not_finite_is_no_sound_one(value):
    claim, sound, count = gaussian_epsilon(1 / 0.2, 1e-5), gaussian(0.2), iter(range(10**6))

    def release(included):
        score = sound(included)
        return value if included and next(count) % 50 == 7 else score

    with pytest.raises(InputError, match="finite scores"):
        assert_epsilon_not_exceeded(release, epsilon=claim, delta=1e-5)
    with pytest.raises(InputError, match="finite scores"):
        one_run_audit(lambda included: included.sum(0) * value)
    with pytest.raises(Inconclusive, match="nothing is claimed"):
        assert_epsilon_not_exceeded(gaussian(0.0), epsilon=float("inf"), delta=1e-5)


@pytest.mark.parametrize(
    "what",
    [
        "state", "loads", "parameter", "frozen", "mode", "attribute", "method", "setting",
        "everywhere",
    ],
)  # fmt: skip
def test_whatever_a_defense_leaves_behind_is_found(tiny, what, monkeypatch):
    kept = torch.nn.modules.module._global_forward_hooks
    monkeypatch.setattr(torch.nn.modules.module, "_global_forward_hooks", kept.copy())
    with pytest.raises(AssertionError, match="does not undo touches") as told:
        assert_removable(tiny, defenses=[Touches(what)])
    if what in ("attribute", "method"):
        name = "last_draw" if what == "attribute" else "forward"
        assert f"nothing became ['{name}']" in str(told.value)


def test_a_defense_that_changes_weights_is_not_what_the_model_was(tiny, photo):
    with pytest.raises(AssertionError, match="changes 1 weights of the model"):
        assert_eval_unchanged(tiny, photo, defenses=[Touches("weights")])
    watched = copy.deepcopy(tiny)
    watched.head.weight.register_hook(lambda gradient: gradient)  # of the user
    assert_removable(watched, defenses="shuffle")


PLAIN = {"a": torch.arange(6.0), "b": torch.ones(3, dtype=torch.bfloat16), "n": torch.tensor(3)}


def test_what_is_sealed_too_little_is_found():
    update = Update(PLAIN)
    sealed = update.seal({"a": "encrypted"})
    assert_sealed(sealed, ["a"], plain=PLAIN)
    assert_sealed(sealed, "a", plain=PLAIN)
    with pytest.raises(AssertionError, match="1 can be read"):
        assert_sealed(update, ["a"])
    with pytest.raises(AssertionError, match="1 are not listed"):
        assert_sealed(sealed, ["a", "c"])
    leaking = replace(sealed, payloads={"x": b"head" + PLAIN["a"].numpy().tobytes()})
    with pytest.raises(AssertionError, match="its values are in the update"):
        assert_sealed(leaking, ["a"], plain=PLAIN)
    with pytest.raises(Inconclusive):
        assert_sealed(sealed, [])
    with pytest.raises(Inconclusive, match="no plain values"):
        assert_sealed(update.seal({"b": "encrypted"}), ["b"], plain=PLAIN)


@pytest.mark.parametrize(
    "where", [slice(None), slice(1, None), slice(16, None)], ids=["whole", "all but one", "half"]
)
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_that_are_there_in_another_type_or_in_part_are_found(kind, where):
    plain = {"a": torch.linspace(1, 2, 32)}
    other = Update({"b": plain["a"][where].to(kind)}).seal({"a": "encrypted"})
    with pytest.raises(AssertionError, match="its values are in the update"):
        assert_sealed(other, ["a"], plain=plain)
    few = {"a": torch.tensor([1e-9, 2e-9, 3e-9, 4e-9] * 2)}  # zeros in half precision
    assert_sealed(Update({"b": torch.zeros(32).half()}).seal({"a": "x"}), ["a"], plain=few)


def test_a_file_that_loses_something_is_found(monkeypatch):
    update = Update({**PLAIN, "empty": torch.zeros(0, 2)}, batch_size=3).seal({"s": "sealed"})
    assert_round_trip(update)
    load = Update.load
    for lost in ({"batch_size": 1}, {"sealed": {}}, {"tensors": {}}):
        monkeypatch.setattr(Update, "load", lambda path, lost=lost: replace(load(path), **lost))
        with pytest.raises(AssertionError, match="differ after a round trip"):
            assert_round_trip(update)
    with pytest.raises(Inconclusive):
        assert_round_trip(Update({}))


def test_only_a_refusal_is_a_refusal(tiny, photo):
    def broken(kind):
        def raises():
            raise kind("no")

        return raises

    assert_fails_closed(broken(Unprotected), control=lambda: 1)
    with pytest.raises(AssertionError, match="it went through"):
        assert_fails_closed(lambda: 1, control=lambda: 1)
    with pytest.raises(AssertionError, match="no error of vitguard"):
        assert_fails_closed(broken(TypeError), control=lambda: 1)
    with pytest.raises(Inconclusive, match="control does not work"):
        assert_fails_closed(lambda: 1, control=broken(TypeError))


def test_outcomes_are_noted():
    drain()
    assert_fails_closed(lambda: protect(torch.nn.Linear(1, 1), []), control=lambda: 1)
    with pytest.raises(Inconclusive):
        assert_round_trip(Update({}))
    assert [(n["property"], n["outcome"]) for n in drain()] == [
        ("assert_fails_closed", "holds"), ("assert_round_trip", "inconclusive"),
    ]  # fmt: skip
