"""User level: the whole update is clipped and noised."""

import pytest
import torch

from vitguard.core import Update
from vitguard.defenses._base import Draws
from vitguard.defenses.privacy import ClientPrivacy
from vitguard.errors import Incompatible, InputError

ANY = None


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


def test_encryption_before_client_privacy_is_refused():
    class Encryption:
        name = "encryption"

    defense = ClientPrivacy()
    with pytest.raises(Incompatible, match="first"):
        defense.check(None, ANY, [Encryption(), defense])
    defense.check(None, ANY, [defense, Encryption()])


@pytest.mark.parametrize(
    "settings", [{"clip": 0}, {"noise": -1}, {"rounds": 0}, {"epsilon": 1, "noise": 1}]
)
def test_settings_out_of_range_raise(settings):
    with pytest.raises(InputError):
        ClientPrivacy(**settings)
