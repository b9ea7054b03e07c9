"""The simulated update: what the victim did, its dropout, its schedule, and errors half way."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch

import vitguard.threats.simulation as simulation_module
from tests.fast import crossed
from vitguard.attacks.inverting import InvertingGradients
from vitguard.attacks.matching.distances import Cosine, attach
from vitguard.attacks.matching.slope import DifferenceSlope
from vitguard.core import Normalization
from vitguard.guard import protect
from vitguard.registry import parse_stack
from vitguard.vit import math_attention

IMAGES = Normalization().apply
RANDOM = {
    "dropout": {"proj_drop_rate": 0.2},
    "of the head": {"drop_rate": 0.2},
    "of attention": {"attn_drop_rate": 0.2},
    "drop path": {"drop_path_rate": 0.4},
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def swin(**changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=16, patch_size=4, window_size=2,
            embed_dim=24, depths=(2, 1), num_heads=(2, 2), num_classes=10, **changes,
        )  # fmt: skip


def swin_view(observe, photo, **changes):
    return observe(swin(**changes), photo)


def gap(view, images, labels, **known):
    """How far the simulation of the true images is from the update, relative."""
    made = view.simulate(images, labels, seeded(), **known).tensors
    pairs = [(made[k].double(), seen.double()) for k, seen in view.update.tensors.items()]
    wrong = sum((a - b).square().sum() for a, b in pairs)
    return float((wrong / sum(b.square().sum() for _, b in pairs)).sqrt())


# dropout and drop path of the model


@pytest.mark.parametrize(
    ("kind", "stack", "how"),
    crossed(
        RANDOM, ["none", "shuffle:ratio=0.5,mask=uniform,dal=tokens"],
        [{}, {"learning_rate": 0.1, "local_steps": 2}],
    ),
)  # fmt: skip
def test_an_equal_generator_gives_an_equal_update_and_moves_nothing_global(
    small_vit, observe, photos, kind, stack, how
):
    view = observe(small_vit(**RANDOM[kind]), photos[:2], defenses=stack, **how)
    labels, before = torch.tensor([1, 2]), torch.get_rng_state()
    first, second = (view.simulate(photos[:2], labels, seeded(3)) for _ in range(2))
    others = [view.simulate(photos[:2], labels, seeded(s)).tensors for s in range(4, 10)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first.tensors[k], second.tensors[k]) for k in first.tensors)
    assert any(not torch.equal(first.tensors[k], o[k]) for o in others for k in first.tensors)


def test_clipped_examples_draw_a_dropout_of_their_own(small_vit, observe, photo):
    model, both = small_vit(proj_drop_rate=0.3), photo.expand(2, -1, -1, -1)
    view = observe(model, both, defenses="privacy:noise=0,clip=1")
    seeds: list[int] = []
    spied = simulation_module.seeded

    def spy(seed, model):
        seeds.append(seed)
        return spied(seed, model)

    view.simulate(both, torch.tensor([1, 1]), seeded())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulation_module, "seeded", spy)
        view.simulate(both, torch.tensor([1, 1]), seeded())
    assert len(set(seeds)) == len(seeds) == 2


def test_a_view_says_whether_the_model_itself_draws(small_vit, observe, photo):
    shuffled = "shuffle:ratio=0.5,mask=uniform"
    assert not observe(small_vit(), photo, defenses=shuffled).random()
    assert swin_view(observe, photo, drop_path_rate=0.0).random() is False
    assert swin_view(observe, photo).random() is True
    for kind in RANDOM.values():
        before = torch.get_rng_state()
        assert observe(small_vit(**kind), photo, learning_rate=0.1).random()
        assert not torch.equal(before, torch.get_rng_state()), "the victim's own dropout"
    view = observe(small_vit(**RANDOM["dropout"]), photo)
    before = torch.get_rng_state()
    assert view.random()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "Swin"])
def test_dropout_of_hugging_face_models_is_noticed(observe, photo, kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 16, "patch_size": 4, "num_labels": 10}
    if kind == "Swin":
        sizes |= {"embed_dim": 24, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
    else:
        sizes |= {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for dropout in (0.0, 0.2):
            rates = {"attention_probs_dropout_prob": dropout, "drop_path_rate": 0.0}
            config = getattr(transformers, f"{kind}Config")(**sizes, **rates)
            model = getattr(transformers, f"{kind}ForImageClassification")(config)
            view = observe(model, photo)
            assert view.random() is (dropout > 0)
            first, second = (view.simulate(photo, torch.tensor([0]), seeded()) for _ in range(2))
            assert all(torch.equal(first.tensors[k], second.tensors[k]) for k in first.tensors)


@pytest.mark.parametrize("kind", RANDOM)
def test_the_difference_slope_sees_one_dropout_in_both_passes(small_vit, observe, photo, kind):
    view = observe(small_vit(**RANDOM[kind]), photo)
    labels, seen = torch.tensor([0]), view.update.tensors
    images = torch.randn(photo.shape, generator=seeded(5)).requires_grad_()
    assert view.objective is not None
    with math_attention():
        made = view.simulate(images, labels, seeded(9)).tensors
        exact = attach(Cosine(), {k: made[k] for k in seen}, seen)
        (wanted,) = torch.autograd.grad(exact, images)
    value = DifferenceSlope(view.objective, Cosine(), seen)(images, labels, 9)
    (got,) = torch.autograd.grad(value, images)
    assert value.item() == pytest.approx(exact.item(), rel=1e-4)
    assert torch.cosine_similarity(got.flatten(), wanted.flatten(), 0) > 0.99
    assert float(got.norm() / wanted.norm()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("derivative", ["auto", "exact"])
@pytest.mark.parametrize("build", ["vit", "swin"])
def test_an_attack_on_a_model_with_dropout_repeats_itself(
    small_vit, observe, photo, build, derivative
):
    model = swin() if build == "swin" else small_vit(proj_drop_rate=0.1)
    view = observe(model, photo)
    attack = InvertingGradients(iterations=4, derivative=derivative)
    results = []
    for seed in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            results.append(attack.run(view, seeded()))
            assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(results[0].images, results[1].images)
    assert results[0].details["distance"] == results[1].details["distance"]


@pytest.mark.slow
def test_threads_do_not_mix_up_their_dropout(small_vit, observe, photo):
    """One view a thread, as in an audit."""
    views = [observe(small_vit(proj_drop_rate=0.2), photo) for _ in range(3)]

    def made(view):
        return [view.simulate(photo, torch.tensor([0]), seeded(s)).tensors for s in range(8)]

    wanted = made(views[0])
    with ThreadPoolExecutor(max_workers=3) as pool:
        for results in pool.map(made, views):
            for tensors, right in zip(results, wanted, strict=True):
                assert all(torch.equal(tensors[k], right[k]) for k in right)


def test_a_model_without_dropout_pays_nothing_for_it(small_vit, observe, photo, monkeypatch):
    view = observe(small_vit(), photo, defenses="shuffle:ratio=0.5,mask=uniform")
    view.simulate(photo, torch.tensor([0]), seeded())
    monkeypatch.setattr(simulation_module, "seeded", None)
    view.simulate(photo, torch.tensor([0]), seeded())


# schedules over local steps


@pytest.mark.parametrize("how", [{"learning_rate": 0.05, "local_steps": 2}, {}])
@pytest.mark.parametrize("warmup", [2, 3])
def test_the_truth_explains_local_steps_inside_a_warm_up(small_vit, observe, photos, warmup, how):
    stack = f"shuffle:ratio=0.5,mask=uniform,warmup={warmup}"
    labels = torch.tensor([3, 5])
    with pytest.warns(UserWarning, match="warm-up"):
        view = observe(small_vit(), photos[:2], labels, defenses=stack, **how)
        for _ in range(2):  # the schedule of the simulation starts again each time
            assert gap(view, IMAGES(photos[:2]), labels) < 1e-5


def test_the_weight_of_dense_localization_moves_with_the_local_steps(small_vit, observe, photo):
    """A ratio so small that nothing is shuffled, so that only the schedule of DAL is random."""
    stack = "shuffle:ratio=0.01,mask=uniform,dal=tokens,dal_head=pca,dal_weight=5,warmup=3"
    labels = torch.tensor([3])
    with pytest.warns(UserWarning, match="moves no patch"):
        view = observe(
            small_vit(), photo, labels, defenses=stack, learning_rate=0.05, local_steps=3
        )
        assert gap(view, IMAGES(photo), labels) < 1e-5


def test_updates_move_the_schedule_unless_they_are_only_looked_at(small_vit, photo):
    model = small_vit().train()
    guard = protect(model, parse_stack("shuffle:ratio=0.5,mask=uniform,warmup=3"))
    optimizer = guard.prepare(torch.optim.SGD(model.parameters(), lr=0.0))
    step = model.vitguard.shuffle.step
    with pytest.warns(UserWarning, match="warm-up"):
        model(photo).sum().backward()
        optimizer.step()
        with guard.rewound():
            guard.update(photo, torch.tensor([0]), learning_rate=0.1, local_steps=2)
        assert int(step) == 1 and step is model.vitguard.shuffle.step
        with pytest.raises(RuntimeError, match="broken"), guard.rewound():
            guard.update(
                photo, torch.tensor([0]), learning_rate=0.1, local_steps=5, loss=_break_at(3)
            )
        assert int(step) == 1
        # a client that trains through updates leaves the warm-up
        guard.update(photo, torch.tensor([0]), learning_rate=0.1, local_steps=2)
    assert int(step) == 3


def _break_at(call):
    calls: list[int] = []

    def loss(logits, labels):
        calls.append(1)
        if len(calls) == call:
            raise RuntimeError("broken")
        return torch.nn.functional.cross_entropy(logits, labels)

    return loss


# an end half way


@pytest.mark.parametrize("place", ["blocks.0", "norm", "head", "vitguard"])
@pytest.mark.parametrize("dal", ["tokens", "positions"])
def test_control_c_inside_a_pass_leaves_the_simulation_usable(
    small_vit, observe, photos, monkeypatch, dal, place
):
    stack = f"shuffle:ratio=0.5,mask=uniform,dal={dal}"
    view = observe(small_vit(), photos[:2], defenses=stack)
    labels = torch.tensor([0, 1])
    whole = view.simulate(photos[:2], labels, seeded())
    guard = view.simulate.__self__._guard()

    def stop(*_):
        raise KeyboardInterrupt

    if place == "vitguard":
        monkeypatch.setattr(guard, "auxiliary_loss", stop)
    else:
        hook = guard.model.get_submodule(place).register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        view.simulate(photos[:2], labels, seeded())
    monkeypatch.undo() if place == "vitguard" else hook.remove()
    again = view.simulate(photos[:2], labels, seeded())
    assert all(torch.equal(again.tensors[k], whole.tensors[k]) for k in whole.tensors)


@pytest.mark.slow
@pytest.mark.parametrize("derivative", ["auto", "exact"])
def test_control_c_inside_a_pass_keeps_the_best_so_far(small_vit, observe, photos, derivative):
    stack = "shuffle:ratio=0.5,mask=uniform,dal=tokens"
    view = observe(small_vit(), photos[:2], defenses=stack)
    passes: list[int] = []

    def stop(*_):
        passes.append(1)
        if len(passes) == 7:
            raise KeyboardInterrupt

    twin = view.simulate.__self__._guard().model
    twin.norm.register_forward_pre_hook(stop)
    guess = InvertingGradients(iterations=50, derivative=derivative).run(view, seeded())
    assert guess.details["interrupted"] is True
    assert guess.images.shape == photos[:2].shape
