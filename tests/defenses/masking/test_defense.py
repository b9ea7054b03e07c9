"""The defense seals, fails closed without a session, and is found by name."""

import pickle

import pytest
import timm
import torch

import vitguard as vg
from vitguard.defenses.encryption import Manifest, SigningKey
from vitguard.defenses.masking import MaskingClient, MaskingServer, Terms
from vitguard.errors import Blocked, Incompatible, InputError, Rejected, Unprotected
from vitguard.registry import parse_stack


def tiny():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, depth=2, num_classes=3,
        embed_dim=24, num_heads=2,
    )  # fmt: skip


BATCH = (torch.rand(1, 3, 16, 16), torch.tensor([1]))


def test_the_command_lines_spec_finds_it_and_its_settings():
    (defense,) = parse_stack("masking:select=all")
    assert defense == vg.MaskedAggregation("all") and defense.spec() == "masking"
    assert "client" not in repr(defense) and pickle.loads(pickle.dumps(defense)) == defense


def test_a_real_update_without_a_client_is_refused():
    guard = vg.protect(tiny(), [vg.MaskedAggregation()])
    with pytest.raises(Unprotected, match="masking client"):
        guard.update(*BATCH)


def test_a_rehearsal_lists_the_names_as_sealed_and_shows_no_value():
    generator = torch.Generator().manual_seed(0)
    guard = vg.protect(tiny(), [vg.MaskedAggregation()], generator=generator)
    update = guard.update(*BATCH)
    assert not update.tensors and not update.payloads and "head.weight" in update.sealed
    with pytest.raises(Blocked):
        update.read("head.weight")


def test_a_weak_selection_is_refused_as_for_encryption():
    with pytest.raises(InputError):
        vg.protect(tiny(), [vg.MaskedAggregation("attention")])
    vg.protect(tiny(), [vg.MaskedAggregation("attention", force=True)])


@pytest.mark.parametrize("hides", ["masking", "encryption:select=all", "masking:select=.*"])
@pytest.mark.parametrize(
    "idle", ["noise", "pruning", "sign-update", "low-rank", "batch-floor", "client-privacy"]
)
def test_a_defense_that_would_find_everything_sealed_is_refused(hides, idle):
    with pytest.raises(Incompatible, match=f"Expected {idle} before"):
        vg.protect(tiny(), f"{hides}+{idle}")
    vg.protect(tiny(), f"{idle}+{hides}")
    if idle != "client-privacy":  # something is left to act on
        vg.protect(tiny(), f"masking:select=attention,force=true+{idle}")


def test_updates_of_three_guards_add_up_to_their_average_in_a_bound_round():
    names = ("a", "b", "c")
    identities = {c: SigningKey.generate() for c in names}
    signing, parameters = SigningKey.generate(), dict(tiny().named_parameters())
    manifest = Manifest.of(parameters, bounds=100.0)
    public = {c: k.public_bytes() for c, k in identities.items()}
    terms = Terms(manifest, public, signing.public_bytes())
    clients = {c: MaskingClient(terms, k, client_id=c) for c, k in identities.items()}
    guards = {c: vg.protect(tiny(), [vg.MaskedAggregation(client=m)]) for c, m in clients.items()}
    server = MaskingServer(terms, signing=signing, round_id=1, base="v1")
    with pytest.raises(Unprotected, match="start_round"):
        guards["a"].update(*BATCH)
    for client in clients.values():
        server.add_keys(client.start_round(1, base="v1"))
    roster = server.roster()
    for client in clients.values():
        server.add_shares(client.share_keys(roster))
    for c, client in clients.items():
        client.take_shares(server.inbox(c))
    with guards["a"].round(2, base="v1"), pytest.raises(Rejected, match="start_round"):
        guards["a"].update(*BATCH)
    plain = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for number, guard in enumerate(guards.values()):
        batch = (BATCH[0] * (number + 1) / 3, BATCH[1])
        with guard.round(1, base="v1"):
            update = guard.update(*batch)
        assert not update.tensors
        server.add_masked(update.payloads["masking"])
        for name, value in vg.protect(tiny(), []).update(*batch).tensors.items():
            plain[name] += value / 3
    survivors = server.survivors()
    for client in clients.values():
        server.add_agreement(client.agree(survivors))
    agreements = server.agreements()
    for client in clients.values():
        server.add_answer(client.answer(agreements))
    mean, step = server.mean(), 100 / terms.levels + 1e-6
    for name, value in plain.items():
        assert (mean[name] - value).abs().max() <= step, name
