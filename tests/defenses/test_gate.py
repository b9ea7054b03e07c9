"""The client that audits itself: what may leave, what may not, and what is said of it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import vitguard as vg
from vitguard import data, self_attack
from vitguard.core import Guess, Update
from vitguard.defenses.gate import LeakGate, Tally
from vitguard.errors import GateClosed, InputError, Unprotected
from vitguard.models import AprilViT, normalization_of
from vitguard.registry import parse_stack


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return AprilViT().train()


def batch_of(net: torch.nn.Module, count: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    size = vg.Anatomy.of(net).image_size
    pixels = data.sample_images(size).pixels[:count]
    return normalization_of(net).apply(pixels), torch.arange(count)


def test_an_undefended_gradient_of_one_image_is_refused_with_the_reason() -> None:
    net = model()
    guard = vg.protect(net, "gate:max_gain=6")
    with pytest.raises(GateClosed, match="dB above a guess without information") as caught:
        guard.update(*batch_of(net))
    decision = caught.value.decision
    assert decision.verdict == "refused" and "no guarantee" in decision.caveat
    assert any(t.state == "ran" and t.gain > 6 for t in decision.tried)
    assert guard.tally.counts == {"refused": 1}
    assert pickle.loads(pickle.dumps(caught.value)).decision == decision


@pytest.mark.slow
def test_a_private_update_at_epsilon_8_passes() -> None:
    net = model()
    private = vg.DifferentialPrivacy(noise=0.75)
    guard = vg.protect(net, [private, LeakGate()])
    assert isinstance(guard.update(*batch_of(net)), Update)
    assert guard.privacy_spent().epsilon <= 8
    assert guard.tally.counts == {"passed": 1}


def test_an_update_of_which_everything_is_sealed_passes() -> None:
    net = model()
    names = [n for n, _ in net.named_parameters()]
    guard = vg.protect(net, "gate")
    sealed = Update({}, sealed=dict.fromkeys(names, "encrypted"))
    assert guard.seal(sealed, batch=batch_of(net)) == sealed
    assert {t.state for t in guard.tally.last.tried} <= {"blocked", "not applicable"}  # type: ignore[union-attr]


def test_an_update_that_encryption_seals_whole_passes() -> None:
    net = model()
    seeded = torch.Generator().manual_seed(0)  # a rehearsal: no encryptor, the tensors are sealed
    guard = vg.protect(net, "encryption:select=all+gate", generator=seeded)
    update = guard.update(*batch_of(net))
    assert not update.tensors and guard.tally.counts == {"passed": 1}


@pytest.mark.slow
def test_an_audit_shows_what_the_gate_would_have_judged() -> None:
    net = model().eval()
    pixels = data.sample_images(vg.Anatomy.of(net).image_size).pixels[:1]
    report = vg.audit(net, (pixels, torch.tensor([0])), defenses="gate", attacks="april")
    assert {f.verdict for f in report.findings} == {"leaks"}
    assert any("no guarantee" in note for note in report.notes)


@pytest.mark.slow
def test_every_third_update_is_looked_at_and_the_first_always(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked = []
    monkeypatch.setattr(
        "vitguard.guard.leaving.attack_own",
        lambda *a, **k: looked.append(guard.tally.updates) or [vg_ran()],
    )
    net = model()
    guard = vg.protect(net, LeakGate(every=3))
    for _ in range(7):
        guard.update(*batch_of(net))
    assert looked == [0, 3, 6]
    assert guard.tally.counts == {"passed": 3, "not looked at": 4}


@pytest.mark.slow
@pytest.mark.parametrize("undecided", [False, True])
def test_after_an_update_that_was_not_let_out_the_next_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, undecided: bool
) -> None:
    bad = self_attack.Tried("one", "failed" if undecided else "ran", gain=9.0)
    verdicts = iter([bad, bad, vg_ran(), bad, vg_ran()])
    monkeypatch.setattr("vitguard.guard.leaving.attack_own", lambda *a, **k: [next(verdicts)])
    net = model()
    guard = vg.protect(net, LeakGate(every=2))
    left = []
    for _ in range(7):
        try:
            guard.update(*batch_of(net))
            left.append(True)
        except GateClosed:
            left.append(False)
    # looked at: 0, 1, 2 (leaves), then 4, 5 (leaves); the same images tried again do not pass
    assert left == [False, False, True, True, False, True, True]


def test_a_model_that_is_given_away_carries_no_decision() -> None:
    net = model()
    guard = vg.protect(net, LeakGate())
    with pytest.raises(GateClosed):
        guard.update(*batch_of(net))
    assert guard.tally.updates == 1
    for given in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert vg.Guard.of(given).tally.last is None and not vg.Guard.of(given).tally.counts


@pytest.mark.slow
def test_a_copy_that_is_made_inside_of_an_audit_has_its_gate() -> None:
    net = model()
    guard = vg.protect(net, LeakGate())
    with guard.ungated():
        twins = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
        guard.update(*batch_of(net))
    for twin in twins:
        with pytest.raises(GateClosed):
            vg.Guard.of(twin).update(*batch_of(twin))


def test_what_an_attack_proves_is_refused_beside_other_images_too() -> None:
    truth = torch.rand(1, 3, 8, 8)
    guess = Guess(1 - truth, verified=torch.tensor([[True, False, False, False]]))
    tried = self_attack._scored("one", guess, truth, (4, 4))
    assert tried.proved == 0.25
    with pytest.raises(GateClosed, match="25% of the patches proved"):
        LeakGate().passage(vg.Update({}, batch_size=1), lambda _: [tried], Tally())


@pytest.mark.parametrize("wrong", ["scale", "size", "number"])
def test_a_proof_counts_beside_images_that_cannot_be_compared(wrong: str) -> None:
    """No truth is needed for it; `undecided="pass"` lets nothing through that is proved."""
    truth = torch.rand(1, 3, 8, 8)
    guess = Guess(truth.clone(), verified=torch.tensor([[True, False, False, False]]))
    if wrong == "number":
        guess.images[0, 0, 0, 0] = torch.nan
    given = {"scale": 255 * truth, "size": torch.rand(1, 3, 16, 16)}.get(wrong, truth)
    tried = self_attack._scored("one", guess, given, (4, 4))
    assert tried.state == "failed" and tried.proved == 0.25
    with pytest.raises(GateClosed, match="proves 25% of the patches"):
        LeakGate(undecided="pass").passage(vg.Update({}, batch_size=1), lambda _: [tried], Tally())


@pytest.mark.parametrize("given", [1, 2])
def test_a_guess_that_makes_the_update_is_refused_beside_other_images(given: int) -> None:
    """A client that hands in the wrong batch would let its own images leave otherwise."""
    guard = vg.protect(model(), "gate:max_gain=6")
    images, labels = batch_of(guard.model, 3)
    update = vg.protect(model(), []).update(images[:1], labels[:1])
    with pytest.raises(GateClosed, match="that make the update, whatever images were given"):
        guard.seal(update, batch=(images[given : given + 1], labels[given : given + 1]))


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.01, 0.1])
def test_a_step_of_unknown_rate_is_refused_beside_other_images(small_vit, rate) -> None:
    """As a Flower client seals it: the difference alone."""
    guard = vg.protect(small_vit(depth=2).train(), "gate")
    images, labels = batch_of(guard.model, 2)
    before = {n: p.detach().clone() for n, p in guard.model.named_parameters()}
    optimizer = torch.optim.SGD(guard.model.parameters(), lr=rate)
    torch.nn.functional.cross_entropy(guard.model(images[:1]), labels[:1]).backward()
    optimizer.step()
    moved = {n: p.detach() - before[n] for n, p in guard.model.named_parameters()}
    with pytest.raises(GateClosed, match=r"not decided|whatever images were given"):
        guard.seal(Update(moved, kind="difference"), batch=(images[1:], labels[1:]))


def test_images_under_another_normalisation_are_told_and_not_decided() -> None:
    net = model()
    guard = vg.protect(net, LeakGate())
    images, labels = batch_of(net)
    with pytest.raises(GateClosed, match=r"not decided.*normalization_of\(model\)"):
        guard.update(images * 2 + 1, labels)


def vg_ran() -> self_attack.Tried:
    return self_attack.Tried("one", "ran", gain=0.0, psnr=1.0)


@pytest.mark.parametrize("state", ["failed", "cut", "not applicable"])
def test_a_gate_whose_attacks_said_nothing_is_not_decided_and_refuses(
    state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [self_attack.Tried("one", state, "why")]  # type: ignore[arg-type]
    monkeypatch.setattr("vitguard.guard.leaving.attack_own", lambda *a, **k: said)
    net = model()
    guard = vg.protect(net, LeakGate())
    with pytest.raises(GateClosed, match="not decided"):
        guard.update(*batch_of(net))
    assert guard.tally.counts == {"not decided": 1}
    lenient = vg.protect(model(), LeakGate(undecided="pass"))
    lenient.update(*batch_of(net))
    assert lenient.tally.counts == {"not decided": 1}


def test_a_gate_without_a_single_attack_is_not_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_attack, "attack_types", dict)
    net = model()
    with pytest.raises(GateClosed, match="none is registered"):
        vg.protect(net, "gate").update(*batch_of(net))


def test_a_budget_that_is_spent_is_not_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_attack.Budget, "over", True)
    net = model()
    with pytest.raises(GateClosed, match="cut"):
        vg.protect(net, "gate").update(*batch_of(net))


def test_a_finished_update_without_its_images_is_refused() -> None:
    net = model()
    guard = vg.protect(net, "gate")
    plain = {n: torch.ones_like(p) for n, p in net.named_parameters()}
    with pytest.raises(Unprotected, match="images behind the update"):
        guard.seal(Update(plain))
    with pytest.raises(Unprotected, match="got 1"):
        guard.seal(Update(plain, batch_size=2), batch=batch_of(net))


def test_withheld_tensors_are_sealed_until_nothing_leaks() -> None:
    net = model()
    guard = vg.protect(net, LeakGate(then="withhold"))
    update = guard.update(*batch_of(net))
    assert update.sealed and guard.tally.counts == {"withheld": 1}
    assert all(t.gain <= 6 for t in guard.tally.last.tried)  # type: ignore[union-attr]


def test_a_refusal_leaves_the_weights_and_counts_in_the_ledger(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leak = self_attack.Tried("one", "ran", gain=30.0, psnr=40.0)
    monkeypatch.setattr("vitguard.guard.leaving.attack_own", lambda *a, **k: [leak])
    net = model()
    private = vg.DifferentialPrivacy(noise=0.75)
    guard = vg.protect(net, [private, LeakGate()])
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(GateClosed):
        guard.update(*batch_of(net))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert guard.privacy_spent().steps == 1


def test_the_adversary_is_told_that_a_gate_runs() -> None:
    (gate,) = parse_stack("gate:max_gain=3,every=2")
    assert gate.settings()["max_gain"] == 3 and gate.settings()["every"] == 2


def test_limits_that_cannot_be_meant_are_refused() -> None:
    for wrong in ({"max_gain": None}, {"every": 0}, {"work": 0.0}, {"then": "hope"}):
        with pytest.raises(InputError):
            LeakGate(**wrong)  # type: ignore[arg-type]


FROZEN = "positions:kind=frozen+gate"


@pytest.mark.parametrize("rate", [0.01, 0.1, 1.0])
def test_a_finished_step_is_judged_from_the_weights_before_it(small_vit, rate) -> None:
    """The adversary knows them; from the moved ones the exact attack once got nothing back."""
    guard = vg.protect(small_vit(depth=2).train(), FROZEN)
    images, labels = batch_of(guard.model)
    before = {n: p.detach().clone() for n, p in guard.model.named_parameters()}
    optimizer = torch.optim.SGD(guard.model.parameters(), lr=rate)
    torch.nn.functional.cross_entropy(guard.model(images), labels).backward()
    optimizer.step()
    moved = {n: p.detach() - before[n] for n, p in guard.model.named_parameters()}
    update = Update(moved, kind="difference", learning_rate=rate)
    with pytest.raises(GateClosed, match="rebuilds an image"):
        guard.seal(update, batch=(images, labels))


def test_an_attack_that_does_not_apply_to_how_the_update_was_made_decides_nothing(
    small_vit,
) -> None:
    guard = vg.protect(small_vit(depth=2).train(), FROZEN)
    adamw = vg.LocalTraining(1e-3, 2, "adamw")
    with pytest.raises(GateClosed, match=r"not decided.*adamw"):
        guard.update(*batch_of(guard.model), training=adamw)
    assert guard.tally.counts == {"not decided": 1}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_attack_that_gives_no_numbers_has_failed_and_passes_nothing(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = self_attack.attack_types()
    monkeypatch.setattr(
        kinds["april"],
        "run",
        lambda self, view, generator: Guess(torch.full((1, 3, 32, 32), value)),
    )
    guard = vg.protect(model(), "gate")
    with pytest.raises(GateClosed) as caught:
        guard.update(*batch_of(guard.model))
    (april,) = (t for t in caught.value.decision.tried if t.attack == "april")
    assert april.state == "failed" and "not finite" in april.reason


def test_a_batch_that_is_too_large_for_the_exact_attacks_passes(small_vit) -> None:
    """Where they do not apply to a plain gradient of it either, nothing is left open."""
    guard = vg.protect(small_vit(depth=2).train(), FROZEN)
    images, labels = batch_of(guard.model, 7)
    guard.update(
        images.repeat(2, 1, 1, 1) + torch.linspace(0, 1, 14).reshape(-1, 1, 1, 1),
        labels.repeat(2) % 10,
    )
    assert guard.tally.counts == {"passed": 1}
