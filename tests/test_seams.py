"""Names decide nothing: a third party's defense or attack counts for what it says of itself."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from vitguard.attacks.base import Attack
from vitguard.attacks.inverting import InvertingGradients
from vitguard.attacks.leaked_mask import leaked_mask
from vitguard.audit import audit
from vitguard.core import Normalization
from vitguard.defenses.base import StepDefense, UpdateDefense
from vitguard.defenses.encryption import EncryptedGradients
from vitguard.defenses.noise import GradientNoise
from vitguard.defenses.positions import FixedPositions
from vitguard.defenses.shuffle import PatchShuffle
from vitguard.errors import Blocked, Incompatible, InputError
from vitguard.guard import protect
from vitguard.plan import plan_report
from vitguard.registry import attack_types
from vitguard.threats import CuriousServer
from vitguard.vit import Anatomy, canonical_parameters

LABEL = torch.tensor([3])


@dataclass(frozen=True)
class Blur(UpdateDefense):
    """Gaussian noise of a third party: `GradientNoise` under another name."""

    name: ClassVar[str] = "blur"
    scale: float = 0.01

    def traits(self, before, anatomy):
        return GradientNoise(self.scale).traits(before, anatomy)

    def seal(self, update, anatomy, draws):
        return GradientNoise(self.scale).seal(update, anatomy, draws)


@pytest.mark.parametrize("positions", [[], [FixedPositions("frozen")]], ids=["learnable", "fixed"])
@pytest.mark.parametrize("scale", [1e-6, 0.3])
def test_noise_under_another_name_gives_the_same_mask_view_and_simulated_update(
    small_vit, observe, photo, positions, scale
):
    stack = [*positions, PatchShuffle(0.5, mask="uniform")]
    own, other = (
        observe(small_vit(), photo, LABEL, defenses=[*stack, noise])
        for noise in (GradientNoise(scale), Blur(scale))
    )
    assert own.traits == other.traits and not own.traits.exact
    for name, tensor in own.update.tensors.items():
        assert torch.equal(tensor, other.update.tensors[name])
    masks = [
        leaked_mask(view, Anatomy.of(view.model), None, torch.Generator().manual_seed(0))
        for view in (own, other)
    ]
    assert masks[0][1] == masks[1][1]
    assert (masks[0][0] is None) == (masks[1][0] is None)
    assert masks[0][0] is None or torch.equal(masks[0][0], masks[1][0])
    images = Normalization().apply(photo)
    made = [
        v.simulate(images, LABEL, torch.Generator().manual_seed(0), shuffled=m)
        for v, (m, _) in zip((own, other), masks, strict=True)
    ]
    for name, tensor in made[0].tensors.items():
        assert torch.equal(tensor, made[1].tensors[name])


def test_noise_that_hides_the_zeros_is_never_read_as_a_shuffle_that_moved_nothing(
    small_vit, observe, photo
):
    stack = [PatchShuffle(0.5), Blur(0.3)]
    view = observe(small_vit(), photo, LABEL, defenses=stack)
    mask, _ = leaked_mask(view, Anatomy.of(view.model), None, torch.Generator().manual_seed(0))
    assert mask is None or bool(mask.any())


@dataclass(frozen=True)
class Reader(Attack):
    """A closed form of a third party: reads the head, and calls it the image."""

    name: ClassVar[str] = "reader"
    family: ClassVar[str] = "closed-form"

    def remains(self, plain):
        needs = tuple(n for n in plain.sizes if n.startswith("head."))
        return (plain.verdict(self.name, needs, "", "the head is plain"),)

    def run(self, view, generator):
        raise AssertionError


@pytest.fixture
def reader(monkeypatch):
    """Register the third party's attack, as an entry point would."""
    known = {**attack_types(), Reader.name: Reader}
    monkeypatch.setattr("vitguard.analysis.attack_types", lambda: known)


def test_a_closed_form_of_a_third_party_is_in_the_plan_and_in_the_refusal(small_vit, reader):
    model = small_vit()
    select = r"patch/position/token/attn\./fc"  # everything but the norms and the head
    found = {a.attack: a for a in plan_report(model, select).attacks}
    assert found["reader"].possible and found["reader"].reason == "the head is plain"
    assert not any(a.gives_away for name, a in found.items() if name != "reader")
    with pytest.raises(Incompatible, match="leaves `reader`: head"):
        protect(model, [EncryptedGradients(select)])
    protect(model, [EncryptedGradients(f"{select}/head")]).remove()
    protect(model, [EncryptedGradients(select, force=True)]).remove()


def test_a_selection_that_only_a_third_party_reads_passes_without_it(small_vit):
    protect(small_vit(), [EncryptedGradients(r"patch/position/token/attn\./fc")])


@dataclass(frozen=True)
class Eavesdropper(CuriousServer):
    """A third party's threat: reads the classifier alone, whatever is sent."""

    def view(self, guard, update, normalization, *, loss=torch.nn.functional.cross_entropy):
        hidden = {n: "out of earshot" for n in update.tensors if not n.startswith("head.")}
        return super().view(guard, update.seal(hidden), normalization, loss=loss)

    def describe(self):
        return {"adversary": "eavesdropper"}


def test_an_audit_takes_any_threat_and_its_control_sees_everything(small_vit, photo):
    report = audit(small_vit(), (photo, LABEL), attacks=["position"], threat=Eavesdropper())
    (finding,) = report.findings
    assert finding.verdict == "blocked" and "out of earshot" in finding.reason
    assert finding.control.verdict == "leaks"
    assert report.to_json()["threat"] == {"adversary": "eavesdropper"}
    with pytest.raises(InputError, match="a threat or withhold"):
        audit(small_vit(), (photo, LABEL), threat=Eavesdropper(), withhold=["patch"])


@pytest.mark.parametrize("selection", ["plan", "embedding/head", r"attn\.qkv/position", "mlp"])
def test_one_grammar_selects_what_is_encrypted_withheld_and_compared(small_vit, photo, selection):
    model = small_vit()
    names = list(canonical_parameters(model))
    wanted = set(Anatomy.of(model).select(selection, names))
    assert 0 < len(wanted) < len(names)
    sealed = protect(copy.deepcopy(model), [EncryptedGradients(selection, force=True)],
                     generator=torch.Generator()).update(photo, torch.tensor([1]))  # fmt: skip
    assert set(sealed.sealed) == wanted
    guard = protect(copy.deepcopy(model), [])
    update = guard.update(photo, torch.tensor([1]))
    view = CuriousServer(withhold=(selection,)).view(guard, update, Normalization())
    assert set(view.update.sealed) == wanted
    seen = CuriousServer().view(guard, update, Normalization())
    matching = InvertingGradients(parameters=selection, iterations=1)
    bare = replace(seen, update=update.seal(dict.fromkeys(wanted, "hidden")))
    with pytest.raises(Blocked, match="hidden"):  # what it compares is just what is hidden
        matching.run(bare, torch.Generator())
    assert len(matching.run(seen, torch.Generator()).images) == 1
    with pytest.raises(InputError, match="repeat the option"):
        CuriousServer(withhold=("embedding|head",)).view(guard, update, Normalization())


def test_a_defense_that_guards_single_updates_says_so_when_a_loop_is_prepared(small_vit):
    class Alone(StepDefense):
        name = "alone"

        def settings(self):
            return {}

        def spec(self):
            return self.name

        def gradient(self, model, loss, batch, draws):
            raise NotImplementedError

    guard = protect(small_vit(), [Alone()])
    optimizer = torch.optim.SGD(guard.model.parameters(), 0.1)
    with pytest.raises(Incompatible, match=r"got alone\. Take its gradients from guard\.update"):
        guard.prepare(optimizer, [1])
