"""User level: the whole update is clipped and noised."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch

from tests.defenses.privacy.privacy_models import build
from vitguard.core import Update
from vitguard.defenses.base import Draws, UpdateDefense
from vitguard.defenses.privacy import ClientPrivacy, DifferentialPrivacy
from vitguard.defenses.privacy.accounting import gaussian_epsilon
from vitguard.errors import Blocked, Incompatible, InputError, Unprotected
from vitguard.guard import Guard, protect
from vitguard.vit import Anatomy

ANY_MODEL = build("vit")
ANY = Anatomy.of(ANY_MODEL)


def update(scale=10.0):
    torch.manual_seed(0)
    return Update({"a": scale * torch.randn(40, 50), "b": scale * torch.randn(3000)})


def flat(sealed):
    return torch.cat([t.flatten() for t in sealed.tensors.values()])


def test_clipped_update_has_a_norm_of_at_most_clip():
    sealed = ClientPrivacy(clip=0.5, noise=0.0).seal(update(), ANY, Draws())
    assert flat(sealed).norm().item() == pytest.approx(0.5, rel=1e-5)
    small = ClientPrivacy(clip=1e6, noise=0.0).seal(update(), ANY, Draws())
    assert torch.equal(flat(small), flat(update()))


def test_client_noise_has_standard_deviation_noise_times_clip():
    defense = ClientPrivacy(clip=0.5, noise=3.0)
    sealed = defense.seal(update(0.0), ANY, Draws(torch.Generator().manual_seed(1)))
    assert flat(sealed).std().item() == pytest.approx(1.5, rel=0.03)


def test_what_is_not_finite_is_refused():
    broken = Update({"a": torch.tensor([1.0, float("nan")])})
    with pytest.raises(InputError, match="finite"):
        ClientPrivacy().seal(broken, ANY, Draws())


def test_what_seals_before_client_privacy_is_refused_whatever_its_name():
    class Sealing(UpdateDefense):
        name = "of-a-third-party"

        def traits(self, before, anatomy):
            return replace(before, sealed=("all",))

        def seal(self, update, anatomy, draws):
            raise AssertionError

    defense = ClientPrivacy()
    with pytest.raises(Incompatible, match="before of-a-third-party"):
        defense.check(ANY_MODEL, ANY, [Sealing(), defense])
    defense.check(ANY_MODEL, ANY, [defense, Sealing()])


@pytest.mark.parametrize(
    "settings", [{"clip": 0}, {"noise": -1}, {"rounds": 0}, {"epsilon": 1, "noise": 1}]
)
def test_settings_out_of_range_raise(settings):
    with pytest.raises(InputError):
        ClientPrivacy(**settings)


# what a guard counts: every update that leaves, however it was made


def guarded(*stack):
    return protect(build("vit", torch.float32), stack)


def released(guard, way):
    """Send one update by one of the ways out."""
    if way == "update":
        return guard.update(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    trained = {k: torch.randn_like(p) for k, p in guard.model.named_parameters()}
    return guard.seal(Update(trained, kind="difference"))


@pytest.mark.parametrize("ways", [["seal"] * 3, ["update"] * 3, ["seal", "update", "seal"]])
def test_every_update_that_leaves_is_a_round_of_the_ledger(ways):
    guard = guarded(ClientPrivacy(noise=5.0, rounds=3))
    for way in ways:
        released(guard, way)
    spent = guard.privacy_spent()
    assert spent.steps == 3
    assert spent.epsilon == ClientPrivacy(noise=5.0).spent(3).epsilon > 0


@pytest.mark.parametrize("way", ["seal", "update"])
def test_no_update_leaves_past_the_rounds_of_a_target_epsilon(way):
    guard = guarded(ClientPrivacy(epsilon=2.0, rounds=2))
    for _ in range(2):
        released(guard, way)
    spent = guard.privacy_spent()
    assert 1.99 < spent.epsilon <= 2.0
    for other in (guard, Guard.of(guard.model), Guard.of(copy.deepcopy(guard.model))):
        with pytest.raises(Unprotected, match="at most 2 updates"):
            released(other, way)
        assert other.privacy_spent() == spent


def test_rounds_go_on_after_a_restart():
    first, second = (guarded(ClientPrivacy(epsilon=2.0, rounds=2)) for _ in range(2))
    released(first, "seal")
    state = first.state_dict()
    assert json.loads(json.dumps(state["ledger"])) == state["ledger"]
    second.load_state_dict(state)
    released(second, "seal")
    with pytest.raises(Unprotected, match="at most 2 updates"):
        released(second, "seal")


def test_past_the_rounds_of_a_given_noise_epsilon_goes_on_growing():
    guard = guarded(ClientPrivacy(noise=5.0))
    for rounds in (1, 2, 3):
        released(guard, "seal")
        assert guard.privacy_spent().epsilon == ClientPrivacy(noise=5.0).spent(rounds).epsilon


def test_without_noise_a_round_spends_an_infinite_epsilon():
    guard = guarded(ClientPrivacy(noise=0.0))
    assert guard.privacy_spent().epsilon == 0
    released(guard, "seal")
    assert guard.privacy_spent().epsilon == math.inf


def test_records_and_clients_have_ledgers_of_their_own():
    guard = guarded(DifferentialPrivacy(noise=2.0), ClientPrivacy(noise=5.0))
    released(guard, "update")
    with pytest.raises(InputError, match="client-privacy"):
        guard.privacy_spent()
    assert (
        guard.privacy_spent("client-privacy").epsilon == ClientPrivacy(noise=5.0).spent(1).epsilon
    )
    assert guard.privacy_spent("privacy").epsilon == gaussian_epsilon(1 / 2.0, 1e-5)


def test_an_update_that_is_refused_is_not_counted():
    guard = guarded(ClientPrivacy(noise=5.0))
    broken = {k: torch.full_like(p, math.nan) for k, p in guard.model.named_parameters()}
    with pytest.raises(InputError, match="finite"):
        guard.seal(Update(broken))
    assert guard.privacy_spent().steps == 0


def test_whole_numbers_do_not_leave_around_the_noise():
    numbers = Update({"a": torch.randn(3), "b": torch.tensor([7])})
    sealed = ClientPrivacy().seal(numbers, ANY, Draws())
    assert set(sealed.tensors) == {"a"} and not torch.equal(sealed.read("a"), numbers.read("a"))
    with pytest.raises(Blocked, match="an integer, which cannot be noised"):
        sealed.read("b")
