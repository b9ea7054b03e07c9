"""A server that hands other weights to each client and in each round: what its sums give."""

import json
from dataclasses import replace

import pytest
import tenseal.sealapi as sealapi
import torch

import vitguard as vg
from tests.fast import fast_for
from vitguard import data
from vitguard.attacks.imprint import ImprintReading
from vitguard.audit.seen import together
from vitguard.defenses.encryption import Decryptor, Encryptor, KeySet, Manifest, SigningKey
from vitguard.defenses.encryption.backend import shared_engine
from vitguard.defenses.encryption.packing import canary
from vitguard.defenses.encryption.wire import (
    MESSAGE,
    SUM,
    Context,
    Header,
    open_message,
    write_message,
)
from vitguard.defenses.masking import MaskingClient, Terms, wire
from vitguard.errors import InputError, NotApplicable, Rejected
from vitguard.federated.local import LocalClient, LocalFederation
from vitguard.models import build_model
from vitguard.threats import CuriousServer, MaliciousServer
from vitguard.vit import Anatomy

SPEC = (
    "vit_tiny_patch16_224:img_size=16,patch_size=4,embed_dim=60,depth=3,num_heads=3,mlp_ratio=2,"
    "num_classes=10"
)
NAMES = ("ana", "bea", "cleo", "dora")


def federation(model, photos, threat, defenses=(), *, each=1, **settings):
    clients = {
        name: LocalClient(photos[i * each : (i + 1) * each], torch.arange(i, i + each) % 10)
        for i, name in enumerate(NAMES)
    }
    seeded = torch.Generator().manual_seed(0)
    settings = {"training": vg.LocalTraining(0.05), "bound": 2.0} | settings
    return LocalFederation(model, clients, defenses, threat=threat, generator=seeded, **settings)


def row(report):
    """The one defended row of what was fished out of a sum."""
    (found,) = [f for f in report.findings if f.defended and "in the sum" in f.exposure]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("spec", fast_for(["none", "encryption:preset=precise"], fast=["none"]))
def test_of_a_sum_of_four_the_clients_whose_gradient_is_suppressed_leave_the_target_alone(
    small_vit, photos, spec
):
    """Honest weights for the target, zeros before the head for the others."""
    threat = MaliciousServer("suppression", target="bea")
    seen = federation(small_vit(), photos, threat, spec).round()
    report = vg.audit(seen, threat=threat, attacks="position")
    finding = row(report)
    assert finding.exposure == "bea in the sum of round 0 (1 image)"
    assert finding.verdict == "leaks" and finding.psnr.max > 60
    honest = federation(small_vit(), photos, None, spec).round()
    report = vg.audit(honest.total, attacks="position")
    (told,) = [f for f in report.findings if f.defended]
    assert told.verdict != "leaks" and told.psnr.max < 30


@pytest.mark.slow
def test_the_target_may_get_bins_and_its_share_of_the_sum_is_read_patch_by_patch(photos):
    threat = MaliciousServer("imprint", target="cleo")
    seen = federation(build_model(SPEC), photos, threat).round()
    report = vg.audit(seen.alone("cleo"), threat=threat, attacks="imprint")
    finding = row(report)
    assert finding.verdict == "leaks" and finding.details["recovered"] >= 0.9
    assert report.threat["target"] == "cleo"


def test_what_a_suppressed_client_sends_moves_nothing_but_the_biases_of_the_head(small_vit, photos):
    threat = MaliciousServer("suppression", target="bea")
    seen = federation(small_vit(), photos, threat).round()
    for message in seen.messages:
        moved = {n for n, t in message.update.tensors.items() if t.any()}
        alone = message.shares[0].client == "bea"
        assert len(moved) > 20 if alone else moved == {"head.bias"}
    share, own = seen.alone("bea"), seen.messages[1].update
    for name, tensor in share.update.tensors.items():
        assert torch.allclose(tensor, own.tensors[name], rtol=1e-5, atol=1e-9), name
    assert not share.update.can_read("head.bias")


@pytest.mark.slow
def test_a_share_is_told_from_a_sum_only_where_it_can_be(small_vit, photos):
    seen = federation(small_vit(), photos, MaliciousServer("suppression", target="bea")).round()
    with pytest.raises(NotApplicable, match="not in the sum"):
        seen.alone("eve")
    decayed = federation(
        small_vit(), photos, None, training=vg.LocalTraining(0.05, weight_decay=0.1)
    ).round()
    with pytest.raises(NotApplicable, match="weight decay"):
        decayed.alone("bea")


@pytest.mark.slow
def test_under_masks_clients_with_other_weights_make_no_sum(small_vit, photos):
    threat = MaliciousServer("suppression", target="bea")
    seen = federation(small_vit(), photos, threat, "masking").round()
    assert seen.total is None and "base" in seen.failed
    same = federation(small_vit(), photos, MaliciousServer("suppression"), "masking").round()
    assert same.total is not None, "all were handed the same: the masks hold no opinion of it"


def test_each_masking_client_refuses_peers_that_name_another_model_whatever_the_server_signs():
    """The server of this test checks nothing: it signs a list of keys for each client alone."""
    manifest = Manifest.of({"w": torch.zeros(4)}, bounds=1.0, max_weight=1.0, run="run")
    signing, own = SigningKey.generate(), {n: SigningKey.generate() for n in NAMES}
    terms = Terms(manifest, {n: k.public_bytes() for n, k in own.items()}, signing.public_bytes())
    clients = {n: MaskingClient(terms, key, client_id=n) for n, key in own.items()}
    handed = {n: "crafted" if n == "bea" else "zeros" for n in NAMES}  # hashes of weights
    keys = {n: c.start_round(0, weight=1.0, base=handed[n]) for n, c in clients.items()}
    body = json.dumps({n: k.hex() for n, k in keys.items()}).encode()
    for name, client in clients.items():
        binding = terms.binding(0, handed[name])
        roster = wire.write_message(wire.ROSTER, "server", body, binding, signing)
        with pytest.raises(Rejected, match="another run, round, base"):
            client.share_keys(roster)


@pytest.fixture(scope="module")
def changing():
    """The sums of two rounds of four clients with four images each, and all images."""
    pixels = data.decoys(16, (16, 16), seed=0)
    threat = MaliciousServer("imprint:directions=1", changing=True)
    return threat, federation(build_model(SPEC), pixels, threat, each=4).run(2), pixels


def view_of(threat, sums):
    views = [threat.at(s.number).view(s.guard, s.update, s.normalization) for s in sums]
    return replace(views[-1], earlier=tuple(views[:-1]))


def wrong(guess, anatomy, pixels):
    """How many patches are called proved, and how many of them are of none of these images."""
    claimed = anatomy.patchify(guess.images)[guess.verified]
    truth = anatomy.patchify(pixels.double()).flatten(0, 1)
    error = torch.cdist(claimed, truth).min(1).values.square() / truth.shape[1]
    return len(claimed), int((error > 1e-4).sum())


@pytest.mark.slow
def test_bins_that_change_by_the_round_tell_more_patches_of_a_sum_than_one_round(changing):
    threat, seen, pixels = changing
    sums = [r.total for r in seen]
    found = [
        ImprintReading().run(view_of(threat, s), torch.Generator())
        for s in (sums[:1], sums[1:], sums)
    ]
    anatomy = Anatomy.of(build_model(SPEC))
    first, second, both = (wrong(guess, anatomy, pixels) for guess in found)
    assert both[0] > max(first[0], second[0]) + 20
    assert first[1] == second[1] == both[1] == 0


@pytest.mark.slow
def test_rounds_of_other_images_prove_no_wrong_patch(changing):
    """The server takes two rounds for the same images, and they are not."""
    threat, seen, pixels = changing
    others = data.decoys(16, (16, 16), seed=3)
    later = federation(build_model(SPEC), others, threat, each=4).run(2)[1]
    guess = ImprintReading().run(view_of(threat, [seen[0].total, later.total]), torch.Generator())
    claims, mistaken = wrong(guess, Anatomy.of(build_model(SPEC)), torch.cat([pixels, others]))
    assert claims > 20 and not mistaken


@pytest.mark.slow
def test_an_audit_of_rounds_reads_them_together_beside_an_equal_control(photos):
    threat = MaliciousServer("imprint:directions=1", changing=True)
    seen = federation(build_model(SPEC), photos, threat).run(2)
    sums = [replace(r, messages=()) for r in seen]
    report = vg.audit(sums, threat=threat, attacks="imprint")
    name = "rounds 0, 1 together: sum of round 1 (4 images of 4 clients)"
    (both,) = [f for f in report.findings if f.defended and f.exposure == name]
    assert both.verdict == both.control.verdict == "leaks"
    assert report.threat["changing"] == "by the round"


def test_only_sums_of_the_same_clients_are_read_together(small_vit, photos):
    one = federation(small_vit(), photos, None)
    sums = [one.round().total, one.round(["ana", "bea"]).total]
    with pytest.raises(InputError, match="same clients"):
        together(sums)
    with pytest.raises(InputError, match="two rounds"):
        together(sums[:1])


@pytest.mark.slow
def test_a_malicious_server_keeps_its_own_model_and_an_honest_one_moves_on(small_vit, photos):
    cases = ((None, False), (CuriousServer(), False), (MaliciousServer("suppression"), True))
    for threat, still in cases:
        one = federation(small_vit(), photos, threat)
        before = {n: t.clone() for n, t in one.weights.items()}
        one.round()
        assert all(torch.equal(t, before[n]) for n, t in one.weights.items()) is still


def test_a_client_that_inspects_refuses_its_part_of_the_round(small_vit, photos):
    threat = MaliciousServer("suppression", target="bea")
    seen = federation(small_vit(), photos, threat, [vg.InspectWeights()]).round()
    assert set(seen.refused) == {"ana", "cleo", "dora"}
    assert all("suspicious" in why or "muted" in why for why in seen.refused.values())


def test_a_server_that_writes_its_own_code_adds_ciphertexts_of_other_models():
    """Encryption binds no model: the marks of two versions are public, and so is their difference.

    A server that only leaves its own checks out is noticed by the clients, this one is not.
    """
    signing = SigningKey.generate()
    keys = KeySet.generate(server=signing.public_bytes())
    manifest = Manifest.of({"w": torch.zeros(4)}, bounds=1.0, max_weight=1.0, run="run")
    handed = {"bea": "crafted", "ana": "zeros"}
    engine, total, marks = shared_engine(keys.layout), None, []
    for name, base in handed.items():
        own = Encryptor(keys.for_client(name), manifest, client_id=name)
        value = torch.full((4,), 0.5 if name == "bea" else 0.0)
        message = own.encrypt({"w": value}, round_id=0, base=base)
        context = Context(keys.for_server(), manifest, 0, base)
        _, (part,) = open_message(message, MESSAGE, context)
        cipher = engine.load(part, seeded=True)
        marks.append(canary(context.binding(), 0, keys.layout))
        if total is None:
            total = cipher
        else:
            engine.add(total, cipher)
    context = Context(keys.for_server(), manifest, 0, "crafted")
    sums = [engine.save(total)]
    plain = sealapi.Plaintext()
    slots = [0j] * (keys.layout.slots - 1) + [marks[0] - marks[1]]
    engine._coder.encode(slots, keys.layout.scale, plain)
    engine._evaluator.add_plain_inplace(total, plain)
    sums.append(engine.save(total))
    lazy, able = (
        write_message(Header(SUM, "server", 2, 2.0), [one], context, signing.sign) for one in sums
    )
    with pytest.raises(Rejected, match="not of the messages it names"):
        Decryptor(keys, manifest).decrypt(lazy, round_id=0, base="crafted")
    told = Decryptor(keys, manifest).decrypt(able, round_id=0, base="crafted")
    assert torch.allclose(2 * told["w"], torch.full((4,), 0.5), atol=1e-3), "bea's share alone"
