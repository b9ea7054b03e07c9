"""A bug planted for each part of the contracts that no installed defense breaks, and its twin."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import pytest
import torch

from vitguard import registry
from vitguard.core import Batch, Update
from vitguard.defenses import protection
from vitguard.defenses.base import BatchDefense, Installed, ModelDefense, UpdateDefense
from vitguard.defenses.noise import GradientNoise
from vitguard.defenses.privacy import DifferentialPrivacy
from vitguard.defenses.shuffle import PatchShuffle
from vitguard.defenses.shuffle.installed import InstalledShuffle
from vitguard.guard import Guard
from vitguard.testing import defense_contracts
from vitguard.testing.defense_contracts import (
    check_clip,
    check_composes,
    check_copies,
    check_draws,
    check_fails_closed,
    check_given,
    check_model,
    check_names,
    check_noise,
    check_quiet,
    check_spec,
    check_state,
    check_tokens,
    check_values,
)

# the spec


@dataclass(frozen=True)
class Scaled(UpdateDefense):
    """Multiplies the update; its spec may forget the factor."""

    name: ClassVar[str] = "scaled"
    factor: float = 1.0
    forgets: ClassVar[bool] = False

    def spec(self):
        return "scaled" if self.forgets else super().spec()

    def seal(self, update, anatomy, draws):
        return update


@pytest.mark.parametrize("forgets", [False, True])
def test_a_spec_that_forgets_a_setting_is_found(monkeypatch, forgets):
    known = {**registry.defense_types(), "scaled": Scaled}
    monkeypatch.setattr(Scaled, "forgets", forgets)
    monkeypatch.setattr(registry, "defense_types", lambda: known)
    monkeypatch.setattr(defense_contracts, "defense_types", lambda: known)
    check_spec(Scaled())
    if not forgets:
        return check_spec(Scaled(0.5))
    with pytest.raises(AssertionError, match=r"scaled reads as .*factor=1\.0.*not as"):
        check_spec(Scaled(0.5))


# the model, and copies of it


class Piece(Installed):
    """What `Marked` leaves on a model: a hook, or what it holds back."""

    def __init__(self, handle, held, *, goes):
        super().__init__()
        self.handle, self.held, self.goes, self.forgets = handle, held, goes, False

    def uninstall(self, model):
        if self.goes:
            self.handle.remove()

    def withheld(self):
        return self.held

    def __getstate__(self):
        return {**self.__dict__, **({"held": {}} if self.forgets else {})}


class Adds:
    def __init__(self, in_eval):
        self.in_eval = in_eval

    def __call__(self, module, args, out):
        return out + 1e-3 if module.training or self.in_eval else None


Bug = Literal["none", "eval", "stays", "renames", "copies"]


@dataclass(frozen=True)
class Marked(ModelDefense):
    """Adds to the output in training, holds the bias of the head back; with a bug or none."""

    name: ClassVar[str] = "marked"
    bug: Bug = "none"

    def traits(self, before, anatomy):
        return before

    def install(self, model, anatomy, draws):
        handle = model.register_forward_hook(Adds(self.bug == "eval"))
        if self.bug == "renames":
            model.head_again = model.head
        piece = Piece(handle, {"head.bias": "held"}, goes=self.bug != "stays")
        piece.forgets = self.bug == "copies"
        return piece


@pytest.mark.parametrize(
    ("bug", "why"),
    [
        ("eval", "changes the output in eval mode"),
        ("stays", "does not undo marked"),
        ("renames", "cannot load what marked:bug=renames exports"),
    ],
)
def test_a_defense_that_changes_the_model_for_good_is_found(bug, why):
    check_model(Marked())
    with pytest.raises(AssertionError, match=why):
        check_model(Marked(bug=bug))


def test_a_copy_that_forgets_what_it_holds_back_is_found():
    check_copies(Marked())
    with pytest.raises(AssertionError, match="an update of a deepcopy under marked has other"):
        check_copies(Marked(bug="copies"))


def test_a_copy_with_other_defenses_is_found(monkeypatch):
    whole = protection.Protection.__getstate__
    monkeypatch.setattr(
        protection.Protection, "__getstate__", lambda self: {**whole(self), "defenses": ()}
    )
    with pytest.raises(AssertionError, match="deepcopy of marked has"):
        check_copies(Marked())


# eval mode, in every way that a model is evaluated


class Now:
    """Adds to the output in eval mode where a condition holds, which may count passes."""

    def __init__(self, when):
        self.when, self.evaluated, self.trained = when, 0, False

    def __call__(self, module, args, out):
        if module.training:
            self.trained = True
            return None
        self.evaluated += 1
        holds = {
            "never": False,
            "without gradients": not torch.is_grad_enabled(),
            "with gradients": torch.is_grad_enabled(),
            "in inference mode": torch.is_inference_mode_enabled(),
            "of one image": len(out) == 1,
            "of more images": len(out) > 2,
            "the second time": self.evaluated == 2,
            "after training passes": self.trained,
            "after training passes, with gradients": self.trained and torch.is_grad_enabled(),
        }
        return out + 1e-3 if holds[self.when] else None


@dataclass(frozen=True)
class Evaluated(ModelDefense):
    """Changes what the model gives in eval mode, now and then."""

    name: ClassVar[str] = "evaluated"
    when: str = "never"

    def install(self, model, anatomy, draws):
        return Piece(model.register_forward_hook(Now(self.when)), {}, goes=True)


@pytest.mark.parametrize(
    "when",
    [
        "without gradients", "with gradients", "in inference mode", "of one image",
        "of more images", "the second time", "after training passes",
        "after training passes, with gradients",
    ],
)  # fmt: skip
def test_a_defense_that_acts_in_eval_mode_now_and_then_is_found(when):
    check_model(Evaluated())
    with pytest.raises(AssertionError, match="changes the output in eval mode") as told:
        check_model(Evaluated(when))
    assert when == "without gradients" or f"eval mode {when}:" in str(told.value)


# draws


@dataclass(frozen=True)
class Noisy(UpdateDefense):
    """Adds noise that somebody may know, or that nobody does."""

    name: ClassVar[str] = "noisy"
    source: str = "draws"
    steps: ClassVar[list] = []

    def traits(self, before, anatomy):
        return replace(before, exact=False, noise=0.5)

    def seal(self, update, anatomy, draws):
        self.steps.append(1)
        seed = {"step": len(self.steps), "constant": 7, "round": 7 + len(self.steps) % 2}
        generator = None
        if self.source in seed:
            generator = torch.Generator().manual_seed(seed[self.source])
        made = {}
        for name, t in update.tensors.items():
            drawn = torch.randn(t.shape, generator=generator)
            if self.source == "draws":
                drawn = draws.normal(t.shape, like=t)
            made[name] = t + 0.5 * t.square().mean().sqrt() * drawn
        return replace(update, tensors=made)


@pytest.mark.parametrize("source", ["step", "constant", "round", "process"])
def test_noise_that_somebody_knows_is_found(source):
    """It has the standard deviation that its traits claim, so that its size tells nothing."""
    check_draws(Noisy())
    Noisy.steps.clear()
    check_noise(Noisy(source))
    with pytest.raises(AssertionError, match=r"from elsewhere|adds the same noise"):
        check_draws(Noisy(source))


@dataclass(frozen=True)
class Uneven(UpdateDefense):
    """Adds noise of the claimed standard deviation over all entries, though not to each."""

    name: ClassVar[str] = "uneven"
    bug: str = "none"

    def traits(self, before, anatomy):
        return replace(before, exact=False, noise=0.5)

    def seal(self, update, anatomy, draws):
        def of(t):
            drawn, size = draws.normal(t.shape, like=t), t.abs()
            place = torch.arange(t.numel(), device=t.device).reshape(t.shape)
            other = {
                "every second": drawn * (place % 2) * 2**0.5,
                "large ones": drawn * (size > size.median()) * 2**0.5,
                "keeps the sign": drawn.abs() * t.sign(),
            }
            return t + 0.5 * t.square().mean().sqrt() * other.get(self.bug, drawn)

        return replace(update, tensors={n: of(t) for n, t in update.tensors.items()})


@pytest.mark.parametrize(
    ("bug", "why"),
    [
        ("every second", "as they were"),
        ("large ones", "as they were"),
        ("keeps the sign", "follows the signs"),
    ],
)
def test_noise_that_leaves_some_entries_or_their_signs_is_found(bug, why):
    check_noise(Uneven())
    with pytest.raises(AssertionError, match=why):
        check_noise(Uneven(bug))


@dataclass(frozen=True)
class Kept(UpdateDefense):
    """Noise that keeps mean and norm of each tensor, or says so."""

    name: ClassVar[str] = "kept"
    bug: str = "none"
    keep_statistics: bool = True

    def traits(self, before, anatomy):
        told = self.bug != "not told"
        return replace(before, exact=False, noise=0.5, rescaled=told)

    def seal(self, update, anatomy, draws):
        scale = 0.25 if self.bug == "half" else 0.5
        kept = GradientNoise(scale, keep_statistics=self.bug != "not kept")
        sealed = kept.seal(update, anatomy, draws)
        if self.bug != "follows the signs":
            return sealed
        made = {}
        for name, t in update.tensors.items():
            noise = draws.normal(t.shape, like=t).abs() * t.sign()
            about = t + 0.5 * t.square().mean().sqrt() * noise
            about = about - about.mean()
            made[name] = t.mean() + about * (t - t.mean()).norm() / about.norm()
        return replace(update, tensors=made)


@pytest.mark.parametrize("scale", [0.01, 0.5, 3.0])
def test_noise_that_keeps_statistics_is_measured_beside_what_is_left_of_the_values(scale):
    check_noise(GradientNoise(scale, keep_statistics=True))


@pytest.mark.parametrize(
    ("bug", "why"),
    [
        ("half", "0.5.* times the standard deviation"),
        ("not kept", "does not keep mean and norm"),
        ("not told", "0.9.* times the standard deviation"),
        ("follows the signs", "standard deviation|follows the signs"),
    ],
)
def test_a_setting_named_as_that_of_noise_excuses_nothing(bug, why):
    check_noise(Kept())
    with pytest.raises(AssertionError, match=why):
        check_noise(Kept(bug))


class Rolls(InstalledShuffle):
    """A shuffle with a bug."""

    bug = "none"

    def place(self, sequence):
        placed = super().place(sequence)
        if self.bug == "state":
            self.register_buffer("last", self._source.clone())
        if self.bug == "first batch" and self.forwards == 1:
            return placed.roll(1, 1)
        return placed.roll(1, 1) if self.bug == "one image" and len(sequence) == 1 else placed

    def __getstate__(self):
        if self.bug != "copies":
            return super().__getstate__()
        return {**super().__getstate__(), "_mask": self._mask, "_source": self._source}


@dataclass(frozen=True)
class RollingShuffle(PatchShuffle):
    """A patch shuffle with a bug, or none."""

    name: ClassVar[str] = "rolling"
    bug: str = "none"

    def install(self, model, anatomy, draws):
        piece = Rolls(model, anatomy, draws, self)
        piece.bug = self.bug
        return piece


@pytest.mark.parametrize("bug", ["first batch", "one image"])
def test_a_shuffle_that_moves_class_tokens_now_and_then_is_found(bug):
    check_tokens(RollingShuffle())
    with pytest.raises(AssertionError, match="changes the class token"):
        check_tokens(RollingShuffle(bug=bug))


@pytest.mark.parametrize(
    ("bug", "why"), [("state", "leaves vitguard.rolling.last in"), ("copies", "its last draw")]
)
def test_a_shuffle_that_keeps_its_draw_where_others_see_it_is_found(bug, why):
    check_state(RollingShuffle())
    with pytest.raises(AssertionError, match=why):
        check_state(RollingShuffle(bug=bug))


# what a defense of the model does to the gradient


class Blurs:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, module, args, out):
        return self.scale * out if module.training else None


@dataclass(frozen=True)
class Damps(ModelDefense):
    """Scales the class scores in training, and says nothing of it in its traits."""

    name: ClassVar[str] = "damps"
    scale: float = 1.0

    def install(self, model, anatomy, draws):
        return Piece(model.register_forward_hook(Blurs(self.scale)), {}, goes=True)


def test_a_defense_of_the_model_that_does_more_than_its_traits_say_is_found():
    check_values(Damps())
    with pytest.raises(AssertionError, match=r"damps is exact by its traits, yet .* is off by"):
        check_values(Damps(0.5))


# failing closed


@dataclass(frozen=True)
class OnlyOnce(UpdateDefense):
    """Hides a tensor of the first update it sees, and of no other one."""

    name: ClassVar[str] = "only-once"
    seen: ClassVar[list] = []

    def seal(self, update, anatomy, draws):
        self.seen.append(1)
        return update.seal({"head.bias": "hidden"}) if len(self.seen) == 1 else update


def test_a_defense_that_hides_the_first_update_alone_is_found():
    OnlyOnce.seen.clear()
    with pytest.raises(AssertionError, match="only-once seals other names in seal"):
        check_fails_closed(OnlyOnce())


PRIVACY = DifferentialPrivacy(noise=1.0)
HOLES = {
    "a plain update under privacy is not refused": (
        Guard, "seal", lambda self, update: update,
    ),
    "plain training under privacy is not refused": (
        protection, "_require_preparation", lambda model, args: None,
    ),
    "an update after remove.. of privacy is not refused": (
        Guard, "_in_place", lambda self: [],
    ),
    "a plain update under privacy breaks with KeyError, not Unprotected": (
        Guard, "seal", lambda self, update: {}[""],
    ),
}  # fmt: skip


@pytest.mark.parametrize("hole", HOLES)
def test_each_way_of_not_failing_closed_is_found(monkeypatch, hole):
    monkeypatch.setattr(*HOLES[hole])
    with pytest.raises(AssertionError, match=hole):
        check_fails_closed(PRIVACY)


def test_the_twins_without_a_hole_pass():
    torch.manual_seed(0)
    check_fails_closed(PRIVACY)
    check_fails_closed(Marked())


# what a defense makes of an update or a batch that it is given


@dataclass(frozen=True)
class Clipped(UpdateDefense):
    """Clips and noises an update; with a bug or none."""

    name: ClassVar[str] = "clipped"
    bug: str = "none"
    clip: float = 1.0

    def traits(self, before, anatomy):
        return replace(before, exact=False, information=0.5, rank=0)

    def seal(self, update, anatomy, draws):
        bug, given = self.bug, update.tensors
        whole = torch.stack([t.norm() for t in given.values()]).norm()
        seed = draws.key()

        def of(name, tensor):
            norm = tensor.norm() if bug == "each tensor" else whole
            kept = tensor if bug == "no clip" else tensor * (self.clip / norm.clamp_min(self.clip))
            if bug == "one noise":
                same = torch.Generator().manual_seed(seed)
                return kept + self.clip * torch.randn(tensor.shape, generator=same)
            noise = self.clip * draws.normal(tensor.shape, like=tensor)
            if bug == "in place":
                return tensor.copy_(kept + noise)
            made = (kept + noise).to(torch.float64 if bug == "wide" else tensor.dtype)
            return made.requires_grad_(bug == "graph")

        made = {n: of(n, t) for n, t in given.items()}
        if bug == "facts":
            return Update(made, batch_size=update.batch_size)
        if bug == "payload":
            plain = given["head.weight"].numpy().tobytes()
            return replace(update, tensors=made, payloads={"clipped": b"head" + plain})
        if bug == "halves":
            halves = given["head.weight"].half().numpy().tobytes()
            return replace(update, tensors=made, payloads={"clipped": halves})
        if bug == "reason":
            told = f"sealed, of norm {float(given['head.bias'].norm()):.4g}"
            return replace(update, tensors=made, sealed={"vitguard.clipped": told})
        return replace(update, tensors=made, sealed={} if bug == "seals" else update.sealed)


CLIPPED = {
    "no clip": (check_clip, "something is not clipped"),
    "each tensor": (check_clip, "not as a whole"),
    "one noise": (check_noise, "same noise to two tensors"),
    "in place": (check_given, "changes cls_token of the update that it is given"),
    "facts": (check_given, "other facts .kind, learning_rate"),
    "wide": (check_names, r"in torch.float64, where the parameter has .* in torch.float32"),
    "graph": (check_names, "with its graph"),
    "payload": (check_quiet, "plain values of head.weight in a payload"),
    "halves": (check_quiet, "plain values of head.weight in a payload"),
    "reason": (check_quiet, "tells of other images another reason"),
    "seals": (
        lambda d: check_composes(d, [registry.defense_types()["withheld"]()]),
        "neither shows nor seals .'pos_embed'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bug", CLIPPED)
def test_what_goes_wrong_with_an_update_is_found(bug):
    check, why = CLIPPED[bug]
    check(Clipped())
    with pytest.raises(AssertionError, match=why):
        check(Clipped(bug))


@dataclass(frozen=True)
class WholeBatch(DifferentialPrivacy):
    """Clips the gradient of the batch in place of each example's."""

    name: ClassVar[str] = "whole-batch"

    def clipped(self, model, loss, batch, *, probed=True):
        found = super().clipped(model, loss, batch, probed=probed)
        norm = torch.stack([t.norm() for t in found.sums.values()]).norm()
        return replace(found, sums={n: len(batch.labels) * t / norm for n, t in found.sums.items()})


def test_a_gradient_that_is_clipped_by_the_batch_is_found():
    check_clip(DifferentialPrivacy(noise=1.0, clip=0.5))
    with pytest.raises(AssertionError, match="with and without one example are"):
        check_clip(WholeBatch(noise=1.0))


@dataclass(frozen=True)
class Transforms(BatchDefense):
    """Makes another batch of a batch."""

    name: ClassVar[str] = "transforms"
    bug: str = "none"

    def transform(self, batch, draws):
        images, labels = batch.images, batch.labels
        return {
            "none": lambda: Batch(images.flip(-1), labels),
            "moves both": lambda: Batch(images.flip(0), labels.flip(0)),
            "moves": lambda: Batch(images.flip(0), labels),
            "drops": lambda: Batch(images[:-1], labels[:-1]),
            "in place": lambda: Batch(images.mul_(0.5), labels),
            "infinite": lambda: Batch(images * float("inf"), labels),
        }[self.bug]()


@pytest.mark.parametrize(
    ("bug", "why"),
    [
        ("moves", "other places than their labels"),
        ("drops", r"makes images of .3, 3, 8, 8"),
        ("in place", "changes the batch"),
        ("infinite", "not finite"),
    ],
)
def test_what_goes_wrong_with_a_batch_is_found(bug, why):
    check_given(Transforms())
    check_given(Transforms("moves both"))
    with pytest.raises(AssertionError, match=why):
        check_given(Transforms(bug))
