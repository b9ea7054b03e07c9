"""A server that writes frozen weights and adapters, and reads the gradients of adapters alone."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import vitguard as vg
from tests.threats.adapted import SPEC, adapters, lora, reads_input, reads_output
from vitguard import data
from vitguard.attacks.imprint import ImprintReading
from vitguard.core import LocalTraining, Normalization
from vitguard.errors import Blocked, InputError, NotApplicable
from vitguard.guard import protect
from vitguard.metrics import recovered
from vitguard.models import build_model
from vitguard.threats import MaliciousServer
from vitguard.threats.crafts.imprint import Imprint
from vitguard.threats.malicious_server import craft_types
from vitguard.vit import Anatomy

PLAIN = Normalization()
NAME = "blocks.0.mlp.adapter.down"

KINDS = {
    "adapters behind the MLP": lambda rank=8: adapters(rank),
    "adapters beside the MLP": lambda rank=8: adapters(rank, reads_input),
    "adapters of ReLU": lambda rank=8: adapters(rank, act=F.relu),
    "LoRA on fc1": lora,
    "LoRA on all linear layers": lambda rank=8: lora(rank, ("qkv", "attn.proj", "fc1", "fc2")),
}
ATTENTION = {"LoRA on qkv": lambda rank=4: lora(rank, ("qkv",))}


def exposed(model, pixels, threat=None, defenses="none", **how):
    threat = threat or MaliciousServer()
    guard = protect(model.train(), defenses)
    guard.model.load_state_dict({**guard.model.state_dict(), **threat.hand_out(guard)})
    with guard.rewound():
        update = guard.update(PLAIN.apply(pixels), torch.arange(len(pixels)) % 10, **how)
    return threat.view(guard, update, PLAIN)


def share(guess, pixels):
    return float(recovered(guess.images, guess.verified, pixels, (4, 4)).double().mean())


@pytest.fixture(scope="module")
def photos():
    return data.sample_images((16, 16), count=4, classes=10).pixels


@pytest.mark.parametrize("kind", {**KINDS, **ATTENTION})
@pytest.mark.parametrize("craft", sorted(craft_types()))
def test_a_craft_for_adapters_changes_neither_keys_shapes_nor_dtypes(kind, craft):
    guard = protect({**KINDS, **ATTENTION}[kind](), ())
    own = guard.public_model()
    before = {k: t.clone() for k, t in own.state_dict().items()}
    made = craft_types()[craft]().weights(own)
    assert {k: (t.shape, t.dtype) for k, t in made.items()} == {
        k: (t.shape, t.dtype) for k, t in before.items()
    }
    assert list(made) == list(before)
    assert all(torch.equal(t, before[k]) for k, t in own.state_dict().items())
    assert any(not torch.equal(t, before[k]) for k, t in made.items())


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_read_from_the_gradients_of_adapters_alone(photos, kind):
    view = exposed(KINDS[kind](), photos[:1])
    fc1 = [n for n in view.update.tensors if n.endswith(("fc1.weight", "fc1.bias"))]
    assert not fc1 and "patch_embed.proj.weight" not in view.update.tensors
    guess = ImprintReading().run(view, torch.Generator())
    assert share(guess, photos[:1]) == 1.0


@pytest.mark.parametrize("kind", ATTENTION)
def test_attention_heads_are_bins_for_low_rank_matrices_beside_the_values(photos, kind):
    """Four heads in each of two blocks: eight of sixteen positions in a round."""
    view = exposed(ATTENTION[kind](), photos[:1])
    assert not any("mlp" in n for n in view.update.tensors)
    guess = ImprintReading().run(view, torch.Generator())
    assert share(guess, photos[:1]) == 0.5


def errors(guess, pixels):
    """Return the mean square error of each verified patch to the nearest true one."""
    anatomy = Anatomy.of(build_model(SPEC))
    claimed = anatomy.patchify(guess.images)[guess.verified]
    truth = anatomy.patchify(pixels.double()).flatten(0, 1)
    return torch.cdist(claimed, truth).min(1).values.square() / truth.shape[1]


WIDE = {
    "adapters behind the MLP": lambda: adapters(32),
    "LoRA on fc1": lambda: lora(32),
    "LoRA on qkv": lambda: lora(12, ("qkv",), SPEC.replace("num_heads=4", "num_heads=12")),
}


@pytest.mark.parametrize("kind", WIDE)
def test_of_a_batch_the_patches_that_stand_alone_are_read_and_no_other_is_called_proved(
    photos, kind
):
    threat = MaliciousServer("imprint:each=2" if "qkv" in kind else "imprint")
    guess = ImprintReading().run(exposed(WIDE[kind](), photos[:2], threat), torch.Generator())
    found = errors(guess, photos[:2])
    assert len(found) >= 6 and found.max() < 1e-4
    assert share(guess, photos[:2]) < 1.0, "some share a bin, and are not read"


@pytest.mark.parametrize("kind", ["adapters behind the MLP", "LoRA on fc1", "LoRA on qkv"])
def test_the_slow_obvious_reading_of_adapters_finds_the_same_patches(photos, kind):
    """One row, one token: no bins, no peeling, no bookkeeping of the package."""
    view = exposed({**KINDS, **ATTENTION}[kind](), photos[:1])
    guess = ImprintReading().run(view, torch.Generator())
    anatomy = Anatomy.of(view.model)
    weight = view.weight("patch_embed.proj.weight").flatten(1)
    still = view.weight("patch_embed.proj.bias") + view.weight("pos_embed")[0, 1:]
    slow = {}
    for bins in view.crafted.bins:
        total = view.read(f"{bins.layer}.weight")
        for place, row in zip(bins.places.tolist(), bins.rows.flatten().tolist(), strict=True):
            token = total[row] - total[row].mean()  # a norm's constant, where there is one
            # size * token = W x + still - mean: the patch and the size together
            there = still[place] - still[place].mean()
            system = torch.cat([weight, -token[:, None]], 1)
            slow[place] = torch.linalg.lstsq(system, -there).solution[:-1]
    assert guess.verified.sum() == len(slow) >= 8
    fast = anatomy.patchify(PLAIN.apply(guess.images))[0]
    for place, patch in slow.items():
        assert guess.verified[0, place]
        assert torch.allclose(fast[place], patch, atol=1e-3)


def test_turns_see_other_positions_until_all_were_seen(photos):
    """Rank 4 beside fc1 of two blocks: eight of sixteen positions in a round."""
    rounds = [
        exposed(lora(4), photos[:1], MaliciousServer(f"imprint:turn={turn}")) for turn in (0, 1)
    ]
    single = [ImprintReading().run(view, torch.Generator()) for view in rounds]
    assert [share(guess, photos[:1]) for guess in single] == [0.5, 0.5]
    assert not (single[0].verified & single[1].verified).any()
    both = replace(rounds[1], earlier=(rounds[0],))
    assert share(ImprintReading().run(both, torch.Generator()), photos[:1]) == 1.0


@pytest.mark.parametrize("kind", ["adapters beside the MLP", "LoRA on fc1", "LoRA on qkv"])
def test_the_difference_of_one_step_of_adapters_is_read(photos, kind):
    view = exposed(
        {**KINDS, **ATTENTION}[kind](), photos[:1], training=LocalTraining(0.01)
    )  # fmt: skip
    assert view.update.kind == "difference"
    guess = ImprintReading().run(view, torch.Generator())
    assert share(guess, photos[:1]) == (0.5 if "qkv" in kind else 1.0)


@pytest.mark.parametrize("rank", [4, 64])
@pytest.mark.parametrize("hook", [reads_output, reads_input])
def test_adapters_without_a_bias_are_counted_by_what_the_norm_adds(photos, hook, rank):
    model = adapters(rank, hook)
    for block in model.blocks:
        block.mlp.adapter.down.bias = None
    guess = ImprintReading().run(exposed(model, photos[:1]), torch.Generator())
    assert share(guess, photos[:1]) == (0.5 if rank == 4 else 1.0)


@pytest.mark.parametrize("make", [adapters, lora])
def test_a_shuffle_does_not_hide_patches_from_crafted_adapters(photos, make):
    """Without positions every block sees all tokens, and a token is not read once for each."""
    guess = ImprintReading().run(
        exposed(make(64), photos[:1], defenses="shuffle:ratio=0.5"), torch.Generator()
    )
    assert share(guess, photos[:1]) >= 0.75
    assert guess.details["found"] <= 16


def test_attention_heads_have_no_bins_for_patches_without_positions(photos):
    with pytest.raises(NotApplicable, match="turns to a position"):
        exposed(lora(4, ("qkv",)), photos[:1], defenses="shuffle:ratio=0.5")


def test_queries_keys_and_values_of_their_own_are_crafted_too(photos):
    """LoRA on query and value, as is usual for models of transformers."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=16, patch_size=4, hidden_size=60, num_hidden_layers=3, num_labels=10,
        num_attention_heads=4, intermediate_size=240, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    names = {n.rpartition(".")[2] for n, _ in model.named_modules()}
    targets = [n for n in ("query", "value", "q_proj", "v_proj") if n in names]
    config = peft.LoraConfig(r=4, target_modules=targets, modules_to_save=["classifier"])
    view = exposed(peft.get_peft_model(model, config), photos[:1])
    guess = ImprintReading().run(view, torch.Generator())
    assert share(guess, photos[:1]) == 0.5


def test_what_is_neither_an_adapter_nor_beside_a_layer_that_gates_is_refused_with_its_reason():
    model = lora(4, ("fc2",))
    with pytest.raises(NotApplicable, match="neither fc1, nor an adapter"):
        Imprint().weights(protect(model, ()).public_model())


def test_dropout_before_low_rank_matrices_leaves_nothing_proved(photos):
    torch.manual_seed(0)
    try:
        view = exposed(lora(8, lora_dropout=0.1), photos[:1])
        guess = ImprintReading().run(view, torch.Generator())
    except NotApplicable:
        return
    assert not guess.verified.any()


def test_without_the_gradient_of_the_adapter_nothing_is_read(photos):
    with pytest.raises(Blocked):
        view = exposed(adapters(), photos[:1], MaliciousServer(withhold=("mlp",)))
        ImprintReading().run(view, torch.Generator())


def test_noise_on_adapters_leaves_nothing_verified(photos):
    try:
        view = exposed(adapters(), photos[:1], defenses="noise:scale=0.1")
        guess = ImprintReading().run(view, torch.Generator())
    except NotApplicable:
        return
    assert not guess.verified.any()


@pytest.mark.slow
def test_an_audit_of_adapters_against_a_malicious_server_leaks(photos):
    report = vg.audit(
        adapters(), (photos[:1], torch.tensor([3])), attacks="imprint", threat=MaliciousServer()
    )
    (finding,) = report.findings
    assert finding.verdict == "leaks" and finding.psnr.mean > 60


OWN = {"beside": lambda: adapters(32, reads_input), "behind": adapters, "LoRA": lora}


@pytest.mark.parametrize("kind", OWN)
def test_where_the_client_keeps_its_own_frozen_weights_the_reason_is_told(photos, kind):
    view = exposed(OWN[kind](), photos[:1], MaliciousServer("imprint:frozen=false"))
    with pytest.raises(NotApplicable, match="own frozen weights"):
        ImprintReading().run(view, torch.Generator())


@pytest.mark.slow
@pytest.mark.parametrize("kind", OWN)
def test_where_the_client_keeps_its_own_frozen_weights_nothing_is_proved_nor_called_resisted(
    photos, kind
):
    threat = MaliciousServer("imprint:frozen=false")
    report = vg.audit(
        OWN[kind](), (photos[:1], torch.tensor([3])), attacks=["imprint", "ladder:seconds=0.1"],
        threat=threat,
    )  # fmt: skip
    assert {f.attack: f.verdict for f in report.findings}["imprint"] == "not applicable"
    for finding in report.findings:
        assert finding.verdict in ("not applicable", "blocked", "inconclusive")
        assert not finding.details.get("verified")
        assert "own frozen weights" in finding.reason or finding.attack != "imprint"


def test_where_the_client_keeps_its_own_frozen_weights_only_trained_ones_are_written(photos):
    model = adapters(32, reads_input)
    made = Imprint(frozen=False).weights(model)
    before = model.state_dict()
    changed = {n for n in made if not torch.equal(made[n], before[n])}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert changed and changed <= trained
    whole = Imprint().weights(model)
    assert {n for n in whole if not torch.equal(whole[n], before[n])} - trained


def test_tokens_that_stand_alone_behind_honest_attention_are_counted_as_they_are(photos):
    """The slow obvious way: the adapter's own inputs, each compared with each row's difference."""
    pixels = photos[:2]
    view = exposed(adapters(32, reads_input), pixels, MaliciousServer("imprint:frozen=false"))
    inputs = []
    layer = view.model.get_submodule("blocks.0.mlp.adapter.down")
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].double()))
    view.model.eval()(PLAIN.apply(pixels))
    handle.remove()
    tokens = inputs[0].detach().flatten(0, 1)
    total, count = view.read(f"{NAME}.weight"), view.read(f"{NAME}.bias")
    alone = 0
    for k in range(len(count)):
        after = k + 1 < len(count)
        row = total[k] - (total[k + 1] if after else 0)
        weight = count[k] - (count[k + 1] if after else 0)
        near = (tokens - row / weight).norm(dim=1).min() / tokens[0].norm()
        alone += int(near < 1e-3)
    with pytest.raises(NotApplicable, match=r"\d+ tokens stand alone") as told:
        ImprintReading().run(view, torch.Generator())
    assert f"{alone} tokens" in str(told.value) and alone > 4


@pytest.mark.parametrize("setting", [{"each": 0}, {"turn": -1}])
def test_settings_of_narrow_layers_out_of_range_are_refused(setting):
    with pytest.raises(InputError, match="at least"):
        Imprint(**setting)
    with pytest.raises(NotApplicable, match="each=9"):
        Imprint(each=9).weights(adapters(8))


@pytest.mark.slow
@pytest.mark.parametrize("kind", WIDE)
def test_no_patch_is_proved_wrong_where_tokens_share_the_few_rows_of_adapters(kind):
    threat = MaliciousServer("imprint:each=3" if "qkv" in kind else "imprint")
    claims = 0
    for seed in range(6):
        for size in (2, 4):
            pixels = data.decoys(size, (16, 16), seed=seed)
            try:
                view = exposed(WIDE[kind](), pixels, threat)
                guess = ImprintReading().run(view, torch.Generator())
            except NotApplicable:
                continue
            found = errors(guess, pixels)
            claims += len(found)
            assert not len(found) or found.max() < 1e-4
    assert claims >= 60


def test_where_only_later_blocks_are_trained_their_fc1_holds_the_bins(photos):
    model = build_model(SPEC)
    model.requires_grad_(False)
    for part in (model.blocks[1], model.blocks[2], model.head):
        part.requires_grad_(True)
    view = exposed(model, photos[:1])
    assert {bins.layer for bins in view.crafted.bins} == {"blocks.1.mlp.fc1"}
    guess = ImprintReading().run(view, torch.Generator())
    assert share(guess, photos[:1]) >= 0.75
