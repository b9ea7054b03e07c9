"""EncryptedGradients in a stack."""

import copy
import pickle

import pytest
import timm
import torch

from vitguard.core import Update
from vitguard.defenses.base import Draws
from vitguard.defenses.encryption import (
    Aggregator,
    Decryptor,
    EncryptedGradients,
    Encryptor,
    KeySet,
    Manifest,
    SigningKey,
    select_names,
)
from vitguard.defenses.positions import FixedPositions, WithheldPositions
from vitguard.errors import Blocked, Incompatible, InputError, Unprotected
from vitguard.guard import protect
from vitguard.registry import parse_stack
from vitguard.vit import Anatomy


@pytest.fixture(scope="module")
def model():
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=2,
        num_classes=5,
    )  # fmt: skip


@pytest.fixture(scope="module")
def batch():
    return torch.randn(1, 3, 32, 32), torch.tensor([2])


def names(model):
    return [n for n, _ in model.named_parameters()]


def rehearsed(model, stack):
    """A guard as an audit makes it: its draws are seeded, and nothing of it ever leaves."""
    return protect(model, stack, generator=torch.Generator().manual_seed(0))


def test_a_rehearsal_inside_a_round_of_a_client_needs_no_other_name_or_weight(model, batch):
    guard = rehearsed(copy.deepcopy(model), [EncryptedGradients()])
    with guard.round(3, base="v1", weight=50.0, client="hospital"):
        assert "thrown away" in guard.update(*batch).sealed["head.bias"]


@pytest.mark.parametrize("rehearse", [10, 1_000_000])
def test_a_client_without_an_encryptor_sends_nothing(model, batch, rehearse):
    guard = protect(copy.deepcopy(model), [EncryptedGradients(rehearse=rehearse)])
    with pytest.raises(Unprotected, match="an encryptor for an update that leaves, got none"):
        guard.update(*batch)
    trained = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    with pytest.raises(Unprotected, match="an encryptor for an update that leaves, got none"):
        guard.seal(Update(trained, kind="difference"))


def test_a_sealed_tensor_cannot_be_read_from_the_update_read_raises_blocked(model, batch):
    guard = rehearsed(copy.deepcopy(model), [EncryptedGradients()])
    update = guard.update(*batch)
    assert not update.tensors and set(update.sealed) == set(names(model))
    with pytest.raises(Blocked, match=r"encrypted .quantised. under a key that was thrown away"):
        update.read("pos_embed")
    assert update.payloads["encryption"][:4] == b"VGHE"


def test_what_is_not_selected_stays_plain(model, batch):
    stack = [FixedPositions(), EncryptedGradients("attention", force=True)]
    update = rehearsed(copy.deepcopy(model), stack).update(*batch)
    anatomy = Anatomy.of(model)
    for name in names(model):
        assert update.can_read(name) == (anatomy.role(name) not in ("attention", "position"))


def test_attention_alone_with_learnable_positions_is_refused_unless_forced(model, batch):
    with pytest.raises(Incompatible, match=r"pos_embed, patch_embed.proj.weight.*force=True"):
        protect(copy.deepcopy(model), [EncryptedGradients("attention")])
    rehearsed(copy.deepcopy(model), [EncryptedGradients("attention", force=True)]).update(*batch)
    for fine in ("all", "plan", r"embedding/blocks\.\d\.attn/fc2"):
        protect(copy.deepcopy(model), [EncryptedGradients(fine)])


@pytest.mark.parametrize("select", ["attention", "embedding", "attention/patch"])
def test_a_block_whose_mlp_stays_plain_is_refused_whatever_hides_positions(model, select):
    """`deep-tokens` finds every token there and the image from them: test_deep_tokens.py."""
    for hidden in (FixedPositions(), WithheldPositions()):
        with pytest.raises(Incompatible, match=r"`token-search`.*mlp\.fc1.*mlp\.fc2"):
            protect(copy.deepcopy(model), [hidden, EncryptedGradients(select)])
        protect(copy.deepcopy(model), [hidden, EncryptedGradients(f"{select}/fc2")])


@pytest.mark.parametrize(
    "hidden", [FixedPositions("frozen"), FixedPositions("sincos"), WithheldPositions()]
)
def test_hidden_positions_do_not_lift_the_refusal_of_what_still_leaks(model, hidden):
    """Audited, the same stack leaks through `span` or `gelu-span`: test_plan_confirmed.py."""
    with pytest.raises(Incompatible, match=r"leaves .*`gelu-span`.*vitguard plan") as refused:
        protect(copy.deepcopy(model), [hidden, EncryptedGradients(r"attn\.qkv")])
    protect(copy.deepcopy(model), [hidden, EncryptedGradients(r"attn\.qkv", force=True)])
    with pytest.raises(Incompatible) as first:
        protect(copy.deepcopy(model), [EncryptedGradients(r"attn\.qkv")])
    for error in (refused, first):
        assert "'plan' or 'all'" in str(error.value) and "FixedPositions" not in str(error.value)


def test_large_selections_are_listed_without_ciphertext_and_say_so(model, batch):
    guard = rehearsed(copy.deepcopy(model), [EncryptedGradients(rehearse=10)])
    update = guard.update(*batch)
    assert "encryption" not in update.payloads and not update.tensors
    with pytest.raises(Blocked, match=r"no ciphertext was made of its \d+ values"):
        update.read("pos_embed")


def test_a_real_run_from_guards_to_the_average(model):
    guard = protect(copy.deepcopy(model), [FixedPositions("frozen")])
    released = [n for n in names(model) if n != "pos_embed"]
    parameters = dict(model.named_parameters())
    manifest = Manifest.of(
        parameters, select_names(guard.anatomy, "plan", released), bounds=20.0, max_weight=5
    )
    signing = SigningKey.generate()
    keys = KeySet.generate(max_clients=3, server=signing.public_bytes())
    aggregator = Aggregator(keys.for_server(), manifest, signing=signing, round_id=1, base="v1")
    plain, weights = [], [5.0, 1.0]
    for number, weight in enumerate(weights):
        batch = torch.randn(1, 3, 32, 32), torch.tensor([number])
        encryptor = Encryptor(keys.for_client(f"c{number}"), manifest, client_id=f"c{number}")
        defense = EncryptedGradients("plan", encryptor=encryptor)
        client = protect(copy.deepcopy(model), [FixedPositions("frozen"), defense])
        encryptor.start_round(1, weight=weight, base="v1")
        update = client.update(*batch)
        aggregator.add(update.payloads["encryption"])
        plain.append(guard.update(*batch))
        for name in update.tensors:
            assert torch.equal(update.read(name), plain[-1].read(name))
    mean = Decryptor(keys, manifest).decrypt(aggregator.finish(), round_id=1, base="v1")
    assert set(mean) == set(manifest.names)
    for name in manifest.names:
        total = sum(w * u.read(name) for w, u in zip(weights, plain, strict=True))
        assert torch.allclose(mean[name], total / sum(weights), atol=2e-3)


def test_an_encryptor_of_other_tensors_or_another_preset_is_refused(model, batch):
    keys = KeySet.generate(preset="many")
    manifest = Manifest.of(dict(model.named_parameters()), ["pos_embed"], bounds=1.0)
    encryptor = Encryptor(keys, manifest, client_id="a")
    with pytest.raises(InputError, match="an encryptor of preset 'quantised', got 'many'"):
        EncryptedGradients(encryptor=encryptor)
    encryptor.start_round(0)
    defense = EncryptedGradients(preset="many", encryptor=encryptor)
    with pytest.raises(InputError, match="a manifest of the"):
        protect(copy.deepcopy(model), [defense]).update(*batch)


def test_an_update_without_anything_to_encrypt_is_refused(model):
    anatomy = Anatomy.of(model)
    with pytest.raises(Unprotected, match="got none for 'attention'"):
        EncryptedGradients("attention").seal(
            Update(tensors={"pos_embed": torch.ones(1)}), anatomy, Draws()
        )
    with pytest.raises(Incompatible, match="got none for 'position'"):
        protect(copy.deepcopy(model), [FixedPositions(), EncryptedGradients("position")])


def test_an_update_that_is_not_finite_is_refused(model):
    update = Update(tensors={"pos_embed": torch.tensor([1.0, float("nan")])})
    with pytest.raises(InputError, match="finite"):
        EncryptedGradients().seal(update, Anatomy.of(model), Draws(torch.Generator()))


def test_specs_round_trip_and_wrong_settings_are_refused(model):
    spec = "encryption:select=attention,force=true"
    (defense,) = parse_stack(spec)
    assert defense == EncryptedGradients("attention", force=True) and defense.spec() == spec
    assert parse_stack("encryption")[0].spec() == "encryption"
    for wrong in ("preset=none", "rehearse=-1", "select=", "encryptor=1"):
        with pytest.raises(InputError):
            parse_stack(f"encryption:{wrong}")
    assert pickle.loads(pickle.dumps(defense)) == defense


@pytest.mark.parametrize("select", ["", "/", "attention/", "[", "nothing_like_this"])
def test_wrong_selections_are_refused(model, select):
    with pytest.raises(InputError):
        select_names(Anatomy.of(model), select, names(model))


@pytest.mark.parametrize(
    "select, role",
    [
        (r"embedding|attn\.qkv", "embedding"),
        (r"attn\.qkv|plan", "plan"),
        (r"head/attn\.qkv|all", "all"),
    ],
)
def test_a_role_among_the_alternatives_of_a_pattern_is_refused(model, select, role):
    joined = select.replace("head/", "").replace("|", "/")
    for read in (
        lambda: select_names(Anatomy.of(model), select, names(model)),
        lambda: protect(copy.deepcopy(model), [EncryptedGradients(select, force=True)]),
    ):
        with pytest.raises(InputError, match=rf"role '{role}' would be read as a pattern") as error:
            read()
        assert f"as in {joined};" in str(error.value) and "repeat the option" in str(error.value)
    assert len(select_names(Anatomy.of(model), joined, names(model))) > 2


def test_an_alternative_that_matches_nothing_is_refused_by_protect(model):
    with pytest.raises(InputError, match=r"of which 'no_such' matches none"):
        protect(copy.deepcopy(model), [EncryptedGradients(r"patch_embed|no_such")])
    for fine in (r"patch_embed|(no_such|attn)\.qkv", r"patch_embed|attn[|]?\.qkv"):
        protect(copy.deepcopy(model), [EncryptedGradients(fine, force=True)])
    stack = [FixedPositions(), EncryptedGradients(r"pos_embed|patch_embed", force=True)]
    protect(copy.deepcopy(model), stack)  # a parameter of the model, though no update has it


@pytest.mark.parametrize("select", ["nothing_like_this", "attention/", "["])
def test_the_error_of_a_selection_lists_plan(model, select):
    with pytest.raises(InputError, match=r"Expected one of attention,.*, plan or a regular"):
        select_names(Anatomy.of(model), select, names(model))


def test_the_public_view_of_a_bound_defense_holds_no_key(model, batch):
    keys = KeySet.generate()
    manifest = Manifest.of(dict(model.named_parameters()), bounds=50.0)
    encryptor = Encryptor(keys, manifest, client_id="a")
    guard = protect(copy.deepcopy(model), [EncryptedGradients(encryptor=encryptor)])
    assert not any("vitguard" in n for n in dict(guard.public_model().named_modules()))
    assert "encryptor" not in repr(guard) and "encryptor" not in str(guard.defenses[0].settings())
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(guard.model)
    copied = copy.deepcopy(guard.model)
    assert copied.vitguard.defenses[0] == guard.defenses[0]
