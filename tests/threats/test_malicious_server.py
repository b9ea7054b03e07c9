"""A server that writes the weights: what it may change, what it reads, and what stops it."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import vitguard as vg
from tests.threats.exposed import PLAIN, exposed
from vitguard import data
from vitguard.attacks.base import guess_of
from vitguard.attacks.equations.rows import Embedding
from vitguard.attacks.imprint import ImprintReading
from vitguard.attacks.ladder import Ladder
from vitguard.attacks.position import PositionInversion
from vitguard.cli.main import main
from vitguard.core import Guess, LocalTraining
from vitguard.errors import Blocked, InputError, NotApplicable
from vitguard.federated.local import LocalClient, LocalFederation
from vitguard.guard import protect
from vitguard.metrics import recovered
from vitguard.models import build_model
from vitguard.threats import CuriousServer, MaliciousServer, parse_threat
from vitguard.threats.crafts.base import Craft
from vitguard.threats.crafts.fishing import Fishing
from vitguard.threats.crafts.imprint import Imprint
from vitguard.threats.crafts.suppression import Suppression
from vitguard.threats.malicious_server import craft_types
from vitguard.vit import Anatomy

SPEC = (
    "vit_tiny_patch16_224:img_size=32,patch_size=8,embed_dim=216,depth=3,num_heads=4,mlp_ratio=2,"
    "num_classes=10"
)


@pytest.fixture(scope="module")
def model():
    return build_model(SPEC)


@pytest.fixture(scope="module")
def photos():
    return data.sample_images((32, 32), count=4, classes=10).pixels


def share(guess, pixels):
    return float(recovered(guess.images, guess.verified, pixels, (8, 8)).double().mean())


@pytest.mark.parametrize("spec", sorted(craft_types()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_craft_changes_neither_keys_shapes_nor_dtypes(model, spec, dtype):
    own = build_model(SPEC).to(dtype)
    before = {k: t.clone() for k, t in own.state_dict().items()}
    made = craft_types()[spec]().weights(own)
    assert {k: (t.shape, t.dtype) for k, t in made.items()} == {
        k: (t.shape, t.dtype) for k, t in before.items()
    }
    assert list(made) == list(before)
    assert all(torch.equal(t, before[k]) for k, t in own.state_dict().items())
    assert any(not torch.equal(t, before[k]) for k, t in made.items())
    own.load_state_dict(made)
    again = craft_types()[spec]().weights(own)
    assert all(torch.equal(t, made[k]) for k, t in again.items()), "crafting twice changes nothing"


def test_a_batch_is_read_patch_by_patch(model, photos):
    view = exposed(model, photos[:2], MaliciousServer())
    guess = ImprintReading().run(view, torch.Generator())
    assert share(guess, photos[:2]) >= 0.9
    alike = (guess.images[:, None] - photos[None, :2].double()).square().mean((-1, -2, -3))
    assert alike.min(1).values.max() < 1e-3, "each image holds its own patches"


@pytest.mark.slow
def test_a_sum_of_clients_is_read_like_a_batch(model, photos):
    views = [exposed(model, photos[i : i + 1], MaliciousServer()) for i in range(4)]
    tensors = {
        n: sum(v.update.tensors[n] for v in views) / 4 for n in views[0].update.tensors
    }  # fmt: skip
    update = vg.Update(tensors, batch_size=4)
    guard = protect(build_model(SPEC), ())
    guard.model.load_state_dict({**guard.model.state_dict(), **MaliciousServer().hand_out(guard)})
    guess = ImprintReading().run(MaliciousServer().view(guard, update, PLAIN), torch.Generator())
    assert share(guess, photos) >= 0.75


def test_the_slow_obvious_reading_finds_the_same_patches(model, photos):
    """Every row against the next, one token each: no banks, no peeling, no bookkeeping."""
    view = exposed(model, photos[:2], MaliciousServer(Imprint(blocks=1, directions=1)))
    guess = ImprintReading().run(view, torch.Generator())
    anatomy = Anatomy.of(view.model)
    (bins,) = view.crafted.bins
    weight, bias = view.read(f"{bins.layer}.weight"), view.read(f"{bins.layer}.bias")
    scale = view.weight("blocks.0.norm2.weight")
    embedding = Embedding.of(view, anatomy)
    largest = bias.abs().max()
    slow = []
    for place, rows in enumerate(bins.rows):
        for k, row in enumerate(rows):
            total, count = weight[row].clone(), bias[row].clone()
            if k + 1 < len(rows):
                total -= weight[rows[k + 1]]
                count -= bias[rows[k + 1]]
            if count.abs() < 1e-3 * largest:
                continue
            token = total / scale / count
            # z = size * token + mean: solve for the patch and the size together
            still = embedding.offset[place] - embedding.offset[place].mean()
            system = torch.cat([embedding.weight, -token[:, None]], 1)
            solved = torch.linalg.lstsq(system, -still).solution
            if abs(float(token.square().mean()) - 1 + 1e-6 / float(solved[-1]) ** 2) < 1e-5:
                slow.append(solved[:-1])
    fast = anatomy.patchify(PLAIN.apply(guess.images))[guess.verified]
    assert len(slow) == guess.details["found"] and len(fast) > 16
    apart = torch.cdist(fast, torch.stack(slow)).min(1).values
    assert apart.max() < 0.05 * fast.norm(dim=1).mean()


@pytest.mark.parametrize("spec", ["imprint", "imprint:gated=false,thresholds=bias,directions=1"])
def test_a_verified_patch_is_right_where_bins_hold_mixtures(model, photos, spec):
    pixels = torch.cat([photos, photos.flip(-1), photos.flip(-2)])  # 192 tokens, few bins
    guess = ImprintReading().run(exposed(model, pixels, MaliciousServer(spec)), torch.Generator())
    anatomy = Anatomy.of(model)
    claimed = anatomy.patchify(guess.images)[guess.verified]
    truth = anatomy.patchify(pixels.double()).flatten(0, 1)
    error = torch.cdist(claimed, truth).min(1).values.square() / truth.shape[1]
    assert len(claimed) and error.max() < 1e-4


@pytest.mark.slow
def test_no_patch_is_proved_wrong_where_many_tokens_share_a_bin(model):
    """By its length alone one in two hundred was wrong: three tokens cancel where two cannot."""
    anatomy, wrong, claims = Anatomy.of(model), 0, 0
    for seed in range(4):
        pixels = data.decoys(64, (32, 32), seed=seed)
        guess = ImprintReading().run(exposed(model, pixels, MaliciousServer()), torch.Generator())
        error = anatomy.patchify(guess.images)[guess.verified][:, None]
        at = guess.verified.nonzero()[:, 1]
        truth = anatomy.patchify(pixels.double())[:, at].transpose(0, 1)
        wrong += int(((error - truth).square().mean(-1).amin(1) > 1e-4).sum())
        claims += len(at)
    assert claims > 500 and wrong == 0


@pytest.mark.parametrize(
    "defense", ["positions:kind=sincos", "positions:kind=none", "positions:kind=frozen", "withheld"]
)
def test_positions_that_are_fixed_or_local_do_not_stop_it(model, photos, defense):
    view = exposed(model, photos[:2], MaliciousServer(), defense)
    assert share(ImprintReading().run(view, torch.Generator()), photos[:2]) >= 0.75


def test_a_shuffle_keeps_the_order_and_nothing_else(model, photos):
    view = exposed(model, photos[:1], MaliciousServer(), "shuffle:ratio=0.5")
    assert share(ImprintReading().run(view, torch.Generator()), photos[:1]) >= 0.75


@pytest.mark.slow
def test_the_difference_of_one_step_is_read(model, photos):
    training = LocalTraining(0.01)
    view = exposed(model, photos[:2], MaliciousServer(), training=training)
    assert view.update.kind == "difference"
    assert share(ImprintReading().run(view, torch.Generator()), photos[:2]) >= 0.9


def test_noise_leaves_nothing_verified(model, photos):
    view = exposed(model, photos[:2], MaliciousServer(), "noise:scale=0.1")
    try:
        guess = ImprintReading().run(view, torch.Generator())
    except NotApplicable:
        return
    assert not guess.verified.any()


def test_without_the_gradient_of_fc1_nothing_is_read(model, photos):
    view = exposed(model, photos[:1], MaliciousServer(withhold=("mlp",)))
    with pytest.raises(Blocked):
        ImprintReading().run(view, torch.Generator())


def test_honest_weights_have_no_bins_and_the_ladder_does_not_try(model, photos):
    view = exposed(model, photos[:1], CuriousServer())
    assert view.crafted is None
    with pytest.raises(NotApplicable):
        ImprintReading().run(view, torch.Generator())
    guess = Ladder(seconds=1.0).run(view, torch.Generator().manual_seed(0))
    assert "imprint" not in guess.details["outcomes"]


@pytest.mark.slow
def test_an_audit_names_the_threat_and_its_control_trains_on_the_same_weights(model, photos):
    threat = MaliciousServer("imprint:blocks=2", withhold=("mlp",))
    report = vg.audit(model, (photos[:2], torch.arange(2)), attacks="imprint", threat=threat)
    assert report.threat["adversary"] == "malicious server"
    assert report.threat["craft"].startswith("imprint:blocks=2")
    (finding,) = report.findings
    assert finding.verdict == "blocked"
    assert finding.control.verdict == "leaks", "everything is sent there, the weights are the same"
    assert "wrote the weights" in report.to_markdown()


@pytest.mark.slow
def test_rounds_of_a_federation_that_started_from_crafted_weights_leak(model, photos):
    threat = MaliciousServer()
    shared = build_model(SPEC)
    shared.load_state_dict(threat.hand_out(protect(build_model(SPEC), ())))
    clients = {
        name: LocalClient(photos[i : i + 1], torch.tensor([i])) for i, name in enumerate("ab")
    }
    seen = LocalFederation(shared, clients, training=LocalTraining(0.01)).round()
    report = vg.audit([seen.total], attacks="imprint", threat=threat)
    assert {f.verdict for f in report.findings} == {"leaks"}


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        ("curious", CuriousServer),
        ("malicious", MaliciousServer),
        ("malicious:craft=imprint:blocks=1,gated=false", MaliciousServer),
    ],
)
def test_a_threat_is_read_from_text(spec, kind):
    threat = parse_threat(spec, ("attention",))
    assert type(threat) is kind and threat.withhold == ("attention",)


@pytest.mark.parametrize(
    "spec",
    ["", "evil", "curious:x", "malicious:imprint", "malicious:craft=none", "malicious:craft="],
)
def test_another_threat_is_refused(spec):
    with pytest.raises(InputError, match="Expected"):
        parse_threat(spec)


@pytest.mark.parametrize("setting", [{"blocks": 0}, {"directions": 0}])
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(InputError, match="at least 1"):
        Imprint(**setting)


def test_an_architecture_without_room_is_refused():
    with pytest.raises(NotApplicable, match="without a head"):
        Imprint().weights(build_model(SPEC.replace("num_classes=10", "num_classes=0")))


@pytest.mark.slow
def test_the_command_line_audits_a_malicious_server(tmp_path, capsys):
    path = tmp_path / "report.json"
    code = main(
        ["audit", "--model", SPEC, "--num-images", "1", "--attack", "imprint", "--defense", "none",
         "--threat", "malicious:craft=imprint:blocks=2", "--json", str(path)]
    )  # fmt: skip
    report = json.loads(path.read_text())
    assert code == 0
    assert report["threat"]["adversary"] == "malicious server"
    assert report["findings"][0]["verdict"] == "leaks"
    assert main(["audit", "--threat", "malicious:craft=nothing"]) == 2


def test_crafts_are_listed(capsys):
    assert main(["list", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert "imprint" in {craft["name"] for craft in said["crafts"]}
    assert all(issubclass(kind, Craft) for kind in craft_types().values())


def test_crafted_weights_give_every_class_a_gradient(model):
    made = build_model(SPEC)
    made.load_state_dict(Imprint().weights(made))
    for label in range(10):
        made.zero_grad()
        F.cross_entropy(made(torch.rand(1, 3, 32, 32)), torch.tensor([label])).backward()
        assert made.get_parameter("blocks.0.mlp.fc1.weight").grad.any()


def gradient(model, pixels, labels):
    """Return the gradient of the mean loss by name, in float64: nothing of the package."""
    own = build_model(SPEC).double()
    own.load_state_dict(model)
    F.cross_entropy(own(PLAIN.apply(pixels.double())), labels).backward()
    return {n: p.grad for n, p in own.named_parameters()}


def test_fishing_leaves_below_the_head_the_gradient_of_one_class_alone(model, photos):
    made = Fishing(label=3).weights(model)
    labels = torch.tensor([1, 3, 0, 1])
    whole, alone = gradient(made, photos, labels), gradient(made, photos[1:2], labels[1:2])
    for name in whole:
        if not name.startswith("head."):
            assert torch.allclose(4 * whole[name], alone[name], rtol=1e-9, atol=1e-12), name


@pytest.mark.slow
def test_a_fished_image_is_read_out_of_its_batch(model, photos):
    labels = torch.tensor([1, 3, 0, 1])
    report = vg.audit(
        model, (photos, labels), attacks="position", threat=MaliciousServer("fishing:label=3")
    )
    (finding,) = report.findings
    assert finding.verdict == "leaks"
    honest = vg.audit(model, (photos, labels), attacks="position")
    assert finding.psnr.max > honest.findings[0].psnr.max + 30


def test_a_class_that_the_head_does_not_have_is_refused(model):
    with pytest.raises(NotApplicable, match="no class 10"):
        Fishing(label=10).weights(model)
    with pytest.raises(InputError, match="at least 0"):
        Fishing(label=-1)


def test_suppressed_clients_leave_one_client_alone_in_a_sum(model, photos):
    dead, labels = Suppression().weights(model), torch.arange(4)
    others = gradient(dead, photos[1:], labels[1:])
    assert {n for n, t in others.items() if t.any()} == {"head.bias"}
    honest = gradient(model.state_dict(), photos[:1], labels[:1])
    total = {n: (honest[n] + others[n]) / 2 for n in honest}
    assert all(torch.equal(2 * total[n], honest[n]) for n in total if n != "head.bias")


@pytest.mark.slow
def test_a_proof_of_honest_weights_is_none_on_crafted_ones_and_the_ladder_reads_the_bins(
    model, photos
):
    """On crafted weights wrong patches solve the equations of `gelu-span`: it called all proved."""
    report = vg.audit(
        model, (photos[:2], torch.tensor([1, 2])), defenses={"shuffle": "shuffle:ratio=0.5"},
        threat=MaliciousServer(),
        attacks=["gelu-span:seconds=0.3", "imprint", "ladder:seconds=0.5"],
    )  # fmt: skip
    found = {(f.configuration, f.attack): f for f in report.findings}
    for stack in ("none", "shuffle"):
        wrong = found[stack, "gelu-span"]
        assert wrong.patch_psnr.mean < 20 and not wrong.details.get("verified")
        assert found[stack, "imprint"].verdict == found[stack, "ladder"].verdict == "leaks"
        assert found[stack, "ladder"].patch_psnr.mean > 40
    assert "one craft: imprint" in report.headline()


@pytest.mark.parametrize("crafted", [True, False])
def test_what_an_attack_proves_counts_on_crafted_weights_only_if_its_proofs_hold_there(
    model, photos, crafted
):
    class Proving(PositionInversion):
        def run(self, view, generator):
            every = torch.ones(1, 16, dtype=torch.bool)
            return Guess(photos[:1], verified=every, details={"verified": 16, "rank": 3})

    class ProvingThere(Proving):
        proves_crafted = True

    threat = MaliciousServer() if crafted else CuriousServer()
    if crafted:
        view = exposed(model, photos[:1], threat)
    else:
        guard = protect(build_model(SPEC).train(), ())
        update = guard.update(PLAIN.apply(photos[:1]), torch.tensor([1]))
        view = threat.view(guard, update, PLAIN)
    plain, there = (guess_of(a(), view, torch.Generator()) for a in (Proving, ProvingThere))
    assert there.verified is not None and there.details == {"verified": 16, "rank": 3}
    assert (plain.verified is None) is crafted and plain.details["rank"] == 3
    assert ("verified" in plain.details) is not crafted
    assert ("unproved" in plain.details) is crafted


@pytest.mark.slow
def test_an_update_of_honest_weights_proves_nothing_to_a_server_that_believes_it_crafted_them(
    model, photos
):
    """The wrong model beside a saved update is refused; its rows tell nothing in any case."""
    guard = protect(build_model(SPEC).train(), ())
    update = guard.update(PLAIN.apply(photos[:2]), torch.tensor([1, 2]))
    threat = MaliciousServer()
    with pytest.raises(vg.errors.InputError, match="that the malicious server handed out"):
        vg.audit_update(model, update, threat=threat, attacks="imprint")
    told = replace(threat.view(guard, update, PLAIN), crafted=threat.made.crafted(model))
    for block in told.model.blocks:  # as if the craft had written it
        block.mlp.fc2.weight.data.fill_(1e-6)
    try:
        guess = ImprintReading().run(told, torch.Generator())
    except NotApplicable:
        return
    assert guess.verified is None or not guess.verified.any()


def test_a_stored_update_is_read_beside_the_weights_that_were_handed_out(model, photos):
    crafted = build_model(SPEC)
    crafted.load_state_dict(MaliciousServer().made.weights(model))
    guard = protect(crafted.train(), ())
    update = guard.update(PLAIN.apply(photos[:1]), torch.tensor([1]))
    report = vg.audit_update(
        guard.public_model(), update, threat=MaliciousServer(), attacks="imprint"
    )
    assert {f.verdict for f in report.findings} == {"leaks"}


@pytest.mark.parametrize("craft", sorted(craft_types()))
def test_a_head_inside_a_stack_of_layers_is_crafted_too(craft):
    """torchvision's head is a Sequential: its linear layer has another name."""
    from torchvision.models import VisionTransformer

    model = VisionTransformer(32, 8, 3, 4, 216, 432, num_classes=10)
    torch.nn.init.normal_(model.heads.head.weight)  # zeros in torchvision
    weights = craft_types()[craft]().weights(model)
    assert weights.keys() == model.state_dict().keys()
    assert not torch.equal(weights["heads.head.weight"], model.state_dict()["heads.head.weight"])


def test_a_craft_that_does_not_fit_the_model_says_which(small_vit):
    with pytest.raises(NotApplicable, match=r"the craft imprint .* without a head.* Audit"):
        MaliciousServer().hand_out(protect(small_vit(num_classes=0), []))
