"""A federated round in one process: what left, what the sum is, who was refused and why."""

import copy
import math

import pytest
import torch

import vitguard as vg
from vitguard.defenses.encryption.presets import preset
from vitguard.errors import InputError, Unprotected
from vitguard.federated.local import LocalClient, LocalFederation
from vitguard.rounds import next_version

NAMES = ("ana", "bea", "cleo")
STEP = vg.LocalTraining(0.05, 2)


@pytest.fixture
def model(small_vit):
    return small_vit(img_size=8, embed_dim=12, depth=1, num_heads=3, num_classes=2)


@pytest.fixture
def clients():
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return {
        n: LocalClient(images[i : 2 * i + 1], torch.zeros(i + 1).long())
        for i, n in enumerate(NAMES)
    }


def federation(model, clients, defenses=(), **settings):
    seeded = torch.Generator().manual_seed(0)
    return LocalFederation(
        model, clients, defenses, **({"training": STEP, "generator": seeded} | settings)
    )


def by_hand(model, clients, defenses=()):
    """The weighted mean of what each client's plain update would be."""
    made = {}
    for name, client in clients.items():
        guard = vg.protect(copy.deepcopy(model).train(), defenses)
        images = vg.Normalization().apply(client.images)
        made[name] = guard.update(images, client.labels, training=STEP).tensors
    whole = sum(len(c.images) for c in clients.values())
    return {
        k: sum(len(clients[n].images) * t[k] for n, t in made.items()) / whole for k in made["ana"]
    }


SCHEMES = {"plain": ("", 0.0), "masking": ("masking", 1e-8), "encryption": ("encryption", None)}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_sum_is_the_weighted_average_of_the_clients_within_the_bound_of_the_scheme(
    model, clients, scheme
):
    spec, limit = SCHEMES[scheme]
    if limit is None:  # a step of quantisation for each client
        limit = 3 * 3 / 6 / preset("quantised").layout(10).levels
    one = federation(model, clients, "+".join(filter(None, ("positions:kind=frozen", spec))))
    seen = one.round()
    wanted = by_hand(model, clients, "positions:kind=frozen")
    assert seen.total is not None and seen.refused == {}
    assert seen.total.update.tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (seen.total.update.tensors[name] - tensor).abs().max() <= limit + 1e-6, name


@pytest.mark.parametrize("spec", ["masking", "encryption"])
def test_no_message_under_a_secure_sum_can_be_read_or_holds_the_bytes_of_a_plain_value(
    model, clients, spec
):
    seen = federation(model, clients, spec).round()
    for message, name in zip(seen.messages, NAMES, strict=True):
        update = message.update
        assert not update.tensors and update.sealed and update.payloads
        alone = {name: clients[name]}
        for tensor in by_hand(model, alone | {"ana": clients[name]}).values():
            (payload,) = update.payloads.values()
            assert tensor.numpy().tobytes()[:32] not in payload


def test_several_rounds_move_the_model_and_chain_its_version(model, clients):
    one = federation(model, clients, "masking")
    first, second = one.run(2)
    assert (first.number, second.number) == (0, 1)
    assert first.version == second.base == next_version(first.base, first.sum_bytes)
    assert one.version == second.version != second.base
    for name, tensor in first.total.update.tensors.items():
        gap = one.weights[name] - first.weights[name]
        assert torch.allclose(gap, tensor + second.total.update.tensors[name], atol=1e-6)
    assert all(torch.equal(p, q) for p, q in zip(
        model.state_dict().values(), first.weights.values(), strict=False))  # fmt: skip


@pytest.mark.slow
def test_the_adversary_is_shown_the_model_that_the_round_started_from(model, clients):
    for spec in ("none", "positions:kind=sincos+masking"):
        one = federation(model, clients, spec)
        for seen in one.run(2):
            for thing in seen.seen():
                public = thing.guard.public_model().state_dict()
                assert all(torch.equal(public[n], t) for n, t in seen.weights.items())
        assert not all(torch.equal(one.weights[n], t) for n, t in seen.weights.items())


@pytest.mark.slow
def test_a_client_with_bad_values_is_refused_with_the_reason_and_the_others_go_on(model, clients):
    broken = clients["cleo"].images.clone()
    broken[0, 0, 0, 0] = math.inf
    clients["cleo"] = LocalClient(broken, clients["cleo"].labels)
    clients["dora"] = clients["ana"]
    for spec in ("none", "masking", "encryption"):
        seen = federation(model, clients, spec).round()
        assert list(seen.refused) == ["cleo"] and "finite" in seen.refused["cleo"], spec
        assert seen.included == ("ana", "bea", "dora")
        assert all(t.isfinite().all() for t in seen.total.update.tensors.values())


def test_a_client_that_seals_nothing_is_refused_where_the_others_seal(model, clients):
    clients["cleo"] = LocalClient(clients["ana"].images, clients["ana"].labels, defenses="noise")
    seen = federation(model, clients, "encryption").round()
    assert "plain" in seen.refused["cleo"] and seen.included == ("ana", "bea")


@pytest.mark.parametrize(("spec", "few"), [("encryption", ["ana"]), ("masking", ["ana", "bea"])])
def test_a_secure_sum_of_too_few_clients_is_refused_and_the_model_stays(model, clients, spec, few):
    one = federation(model, clients, spec)
    before = one.version
    seen = one.round(few)
    assert seen.total is None and "fewer than" in seen.failed
    assert one.version == before and seen.version == seen.base
    assert one.round().total is not None  # the next one is not harmed


def test_a_plain_sum_of_one_client_is_taken_since_nothing_forbids_it(model, clients):
    seen = federation(model, clients).round(["ana"])
    ((message,), total) = seen.messages, seen.total
    for name, tensor in message.update.tensors.items():
        assert torch.allclose(tensor, total.update.tensors[name])


def test_a_client_past_its_privacy_target_is_refused_and_the_ledger_counts_every_round(
    model, clients
):
    one = federation(model, clients, "client-privacy:epsilon=8,rounds=2", generator=None)
    rounds = one.run(3)
    assert [list(r.refused) for r in rounds] == [[], [], list(NAMES)]
    assert rounds[2].total is None and rounds[2].version == rounds[1].version
    spent = one.guards["ana"].privacy_spent()
    assert spent.epsilon <= 8 and one.guards["ana"]._ledgers["client-privacy"].steps == 2


def test_a_train_function_trains_the_guarded_model_in_place_and_its_difference_is_sealed(
    model, clients
):
    def train(own):
        with torch.no_grad():
            own.model.head.bias += 0.5

    clients = {n: LocalClient(c.images, c.labels, train=train) for n, c in clients.items()}
    seen = federation(model, clients, "masking").round()
    moved = seen.total.update.tensors
    assert torch.allclose(moved["head.bias"], torch.full((2,), 0.5), atol=1e-6)
    assert not any(t.any() for n, t in moved.items() if n != "head.bias")


def test_defenses_that_need_each_example_refuse_a_train_function_that_did_not_prepare(
    model, clients
):
    idle = {n: LocalClient(c.images, c.labels, train=lambda own: None) for n, c in clients.items()}
    seen = federation(model, idle, "privacy:noise=1").round()
    assert set(seen.refused) == set(NAMES) and "prepare" in seen.refused["ana"]


def test_what_is_no_client_or_no_training_is_one_clear_error(model, clients):
    with pytest.raises(InputError, match="clients"):
        federation(model, {})
    with pytest.raises(InputError, match="LocalClient"):
        federation(model, {"ana": clients["ana"].images})
    with pytest.raises(InputError, match="clients by name"):
        federation(model, list(clients.values()))
    with pytest.raises(InputError, match="labels as a tensor"):
        LocalClient(clients["ana"].images, [1])
    with pytest.raises(InputError, match="learning rate"):
        federation(model, clients, training=vg.LocalTraining())
    with pytest.raises(InputError, match="one of encryption and masking"):
        federation(model, clients, "encryption+masking")
    with pytest.raises(InputError, match="names of clients"):
        federation(model, clients).round(["nobody"])


def test_the_repr_of_a_client_and_of_a_round_shows_no_image(model, clients):
    seen = federation(model, clients).round()
    assert "tensor(" not in repr(seen) and "tensor(" not in repr(clients["ana"])


def test_colluding_clients_in_a_list_are_one_clear_error(model, clients):
    with pytest.raises(InputError, match="one by one"):
        federation(model, clients).round().without(["ana"])


def test_what_a_round_returns_holds_no_keys(model, clients):
    for spec in ("masking", "encryption"):
        seen = federation(model, clients, spec).round()
        for message in (*seen.messages, seen.total):
            for defense in message.guard.defenses:
                assert not getattr(defense, "_encryptor", None)
                assert not getattr(defense, "_client", None)


def test_a_real_client_without_keys_still_raises(model, clients):
    guard = vg.protect(copy.deepcopy(model), "masking")
    with pytest.raises(Unprotected):
        guard.update(torch.rand(1, 3, 8, 8), torch.tensor([0]), training=STEP)


def test_a_replayed_round_is_refused_by_the_clients(model, clients):
    one = federation(model, clients, "encryption")
    one.round()
    one.number = 0
    seen = one.round()
    assert seen.total is None and "round 0 after round 0" in seen.failed


def test_a_callback_cannot_call_a_difference_a_gradient(model, clients):
    said = LocalClient(
        clients["ana"].images, clients["ana"].labels, train=lambda guard: None,
        training=vg.LocalTraining(),
    )  # fmt: skip
    with pytest.raises(InputError, match="learning rate"):
        federation(model, {"ana": said})


def test_what_a_client_knows_that_it_sent_is_what_left_where_noise_comes_after_the_masks(
    model, clients
):
    seen = federation(model, clients, "masking:select=head,force=true+noise:scale=1").round()
    left, message = seen.without("ana", "bea"), seen.messages[2]
    assert message.update.tensors
    for name, sent in message.update.tensors.items():
        assert (left.update.tensors[name] - sent).abs().max() <= 1e-6, name


@pytest.mark.parametrize("weight", [0, 0.0, -1, float("nan"), float("inf"), True, "3"])
def test_a_weight_that_is_none_is_refused_not_taken_for_the_number_of_images(clients, weight):
    images, labels = next((c.images, c.labels) for c in clients.values())
    with pytest.raises(InputError, match="a finite weight above 0"):
        LocalClient(images, labels, weight=weight)


def test_drawn_positions_are_the_same_for_all_clients(model, clients):
    made = federation(model, clients, "positions:kind=random", generator=None)
    made.run(2)
    positions = [g.model.pos_embed for g in made.guards.values()]
    assert all(torch.equal(p, positions[0]) for p in positions)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["noise:scale=0.001", "masking", "encryption"])
def test_tied_parameters_move_by_each_of_their_names(model, clients, spec):
    """The next load takes the last name: one that stayed would undo what the round did."""
    model.blocks.append(model.blocks[0])
    made = federation(model, clients, spec)
    before = dict(made.weights)
    made.run(2)
    one, other = "blocks.0.mlp.fc2.weight", "blocks.1.mlp.fc2.weight"
    assert not torch.equal(made.weights[one], before[one])
    assert torch.allclose(made.weights[one], made.weights[other], atol=1e-3)
    handed = made.round().messages[0].guard.model.state_dict()
    assert not torch.equal(handed[one], before[one])


@pytest.mark.parametrize(
    ("change", "do"),
    [
        (lambda pixels: pixels * 255, "Divide by 255"),
        (lambda pixels: (pixels * 255).byte(), "Divide by 255"),
        (lambda pixels: pixels * 2 - 1, "Undo the normalisation"),
    ],
)
def test_what_are_no_pixels_in_0_to_1_is_told_before_a_round(clients, change, do):
    one = clients["cleo"]
    with pytest.raises(InputError, match=rf"pixels in \[0, 1\].*{do}"):
        LocalClient(change(one.images), one.labels)


def test_a_client_of_grey_images_is_refused_by_a_model_of_colour(model, clients):
    clients["cleo"] = LocalClient(clients["cleo"].images[:, :1], clients["cleo"].labels)
    made = federation(model, clients).round()
    assert list(made.refused) == ["cleo"] and "3 channels" in made.refused["cleo"]


def test_a_client_without_images_is_told_before_it_ends_a_round(clients):
    with pytest.raises(InputError, match="at least one image"):
        LocalClient(torch.zeros(0, 3, 8, 8), torch.zeros(0).long())


def test_a_client_whose_batch_is_too_small_for_batch_norms_ends_no_round(model, clients):
    model.head = torch.nn.Sequential(torch.nn.BatchNorm1d(12), torch.nn.Linear(12, 2))
    made = federation(model, clients, "noise:scale=0.01").round()
    assert list(made.refused) == ["ana"] and "at least two images" in made.refused["ana"]
    assert len(made.included) == 2
