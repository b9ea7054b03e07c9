"""The matching loop: draws, labels, resume, interruption, what it matches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import timm
import torch

from tests.fast import crossed, fast_for
from vitguard.attacks.inverting import InvertingGradients
from vitguard.attacks.matching import run as matching_run
from vitguard.attacks.matching.attack import MatchingAttack
from vitguard.attacks.matching.distances import Cosine, SquaredError
from vitguard.attacks.matching.restart import Recipe, at
from vitguard.attacks.matching.subspace import Subspace, row_space
from vitguard.core import AffineSpace, Guess, Normalization
from vitguard.defenses.shuffle import PatchShuffle
from vitguard.errors import Blocked, InputError
from vitguard.guard import protect
from vitguard.threats import CuriousServer
from vitguard.vit import Anatomy

NORMALIZATION = Normalization((0.4, 0.5, 0.6), (0.3, 0.25, 0.2))


@dataclass(frozen=True)
class Plain(MatchingAttack):
    """A recipe for tests: squared error, Adam."""

    name: ClassVar[str] = "plain"
    joint: str = ""
    optimizer: str = "adam"

    def recipe(self, view, anatomy):
        return Recipe(
            distance=SquaredError(),
            rate=0.05,
            joint_labels=self.joint,
            optimizer=self.optimizer,
            line_search=True,
        )


def make_model(width=32, **changes):
    torch.manual_seed(0)
    settings = {"img_size": 16, "patch_size": 4, "embed_dim": width, "depth": 1, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **(settings | changes))


def make_view(batch=1, defenses=(), withhold=(), model=None, seed=1, **how):
    generator = torch.Generator().manual_seed(seed)
    model = model if model is not None else make_model()
    size = Anatomy.of(model).image_size
    images = torch.rand(batch, 3, *size, generator=generator)
    images = torch.nn.functional.avg_pool2d(images, 3, 1, 1)
    labels = torch.arange(batch) % 5
    guard = protect(model.train(), list(defenses), generator=generator)
    update = guard.update(NORMALIZATION.apply(images), labels, **how)
    view = CuriousServer(withhold=tuple(withhold)).view(guard, update, NORMALIZATION)
    return view, images, labels


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_distance_falls_and_the_label_is_inferred():
    view, images, labels = make_view(seed=3)
    guess = Plain(iterations=30).run(view, seeded())
    assert guess.details["distance"] < 0.2 * guess.details["distance at the start"]
    assert guess.labels.tolist() == labels.tolist()
    assert guess.images.shape == images.shape
    assert guess.images.min() >= 0 and guess.images.max() <= 1


def test_same_seed_same_result_and_another_seed_another():
    view, _, _ = make_view()
    attack = Plain(iterations=3, restarts=2)
    first, second, other = (attack.run(view, seeded(s)).images for s in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_the_truth_is_a_fixed_point():
    view, images, _ = make_view()
    start = Guess(images=images)
    guess = Plain(iterations=1, start=start).run(view, seeded())
    assert guess.details["distance"] < 1e-8
    torch.testing.assert_close(guess.images, images, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "joint"), crossed(["adam", "lbfgs"], ["random", ""]))
def test_a_killed_attack_resumes_to_the_same_end(tmp_path, optimizer, joint):
    view, _, _ = make_view()
    size = {"iterations": 6, "restarts": 2} if optimizer == "adam" else {"iterations": 2}
    whole = Plain(**size, optimizer=optimizer, joint=joint)
    unbroken = whole.run(view, seeded())
    path = str(tmp_path / "run.pt")

    def kill(progress):
        if progress.iteration == whole.iterations // 2 + 1:
            raise SystemExit  # as a scheduler would, after the last save

    saving = replace(whole, resume=path, watch=kill)
    pause, matching_run._SAVE_EVERY = matching_run._SAVE_EVERY, 0.0
    try:
        with pytest.raises(SystemExit):
            saving.run(view, seeded())
    finally:
        matching_run._SAVE_EVERY = pause
    done: list[int] = []
    resumed = replace(saving, watch=lambda p: done.append(p.iteration)).run(view, seeded())
    assert done[0] == whole.iterations // 2 + 1, "nothing was resumed"
    assert torch.equal(resumed.images, unbroken.images)
    assert resumed.details["distance"] == unbroken.details["distance"]


def test_a_saved_run_of_other_settings_is_refused(tmp_path):
    view, _, _ = make_view()
    path = str(tmp_path / "run.pt")
    Plain(iterations=2, resume=path).run(view, seeded())
    with pytest.raises(InputError, match="another iterations"):
        Plain(iterations=3, resume=path).run(view, seeded())
    with pytest.raises(InputError, match="another seed"):
        Plain(iterations=2, resume=path).run(view, seeded(1))
    other, _, _ = make_view(seed=9)
    with pytest.raises(InputError, match="another update"):
        Plain(iterations=2, resume=path).run(other, seeded())
    (tmp_path / "noise").write_bytes(b"nothing")
    with pytest.raises(InputError, match="a saved run"):
        Plain(iterations=2, resume=str(tmp_path / "noise")).run(view, seeded())


def test_control_c_keeps_the_best_so_far_and_says_so():
    view, _, _ = make_view()

    def stop(progress):
        if progress.iteration == 4:
            raise KeyboardInterrupt

    guess = Plain(iterations=1000, watch=stop).run(view, seeded())
    assert guess.details["interrupted"] is True
    assert guess.details["iterations"] == 4
    assert guess.details["distance"] < guess.details["distance at the start"]


def test_a_time_budget_ends_the_run():
    view, _, _ = make_view()
    guess = Plain(iterations=10**6, seconds=0.2).run(view, seeded())
    assert guess.details["out of time"] and guess.details["iterations"] < 10**6


def test_a_shortened_schedule_says_so_and_names_the_full_one():
    view, _, _ = make_view()
    shortened = InvertingGradients.fast(iterations=2).run(view, seeded())
    assert shortened.details["schedule"] == (
        "shortened: 2 iterations where the full run has 24,000"
    )


def test_the_budget_of_a_fast_preset_cuts_iterations_and_not_those_that_were_given():
    view, _, _ = make_view()
    assert InvertingGradients.fast().budget is not None
    assert InvertingGradients.fast(iterations=7).budget is None
    tight = replace(InvertingGradients.fast(), budget=1.0)
    guess = tight.run(view, seeded())
    assert guess.details["iterations"] == 5
    assert "to fit the budget of a CPU: 5 iterations" in guess.details["schedule"]
    assert InvertingGradients.fast().budget > 1e11 and InvertingGradients().budget is None
    roomy = replace(tight, budget=1e12, iterations=6).run(view, seeded())
    assert roomy.details["iterations"] == 6


def test_the_budget_shortens_the_steps_of_lbfgs_too():
    view, _, _ = make_view()
    evaluations: list[int] = []
    simulate = view.simulate

    def counted(*arguments, **known):
        evaluations.append(1)
        return simulate(*arguments, **known)

    Plain(iterations=4, optimizer="lbfgs", budget=1.0).run(
        replace(view, simulate=counted), seeded()
    )
    assert 1 <= len(evaluations) <= 8


def test_fused_attention_is_off_inside_the_loop_only():
    view, _, _ = make_view()
    flash = torch.backends.cuda.flash_sdp_enabled
    assert flash()
    inside: list[bool] = []
    simulate = view.simulate

    def spy(*arguments):
        inside.append(flash())
        return simulate(*arguments)

    Plain(iterations=2, derivative="exact").run(replace(view, simulate=spy), seeded())
    assert inside and not any(inside)
    assert flash()

    def broken(*arguments):
        raise RuntimeError("no update")

    with pytest.raises(RuntimeError, match="no update"):
        Plain(iterations=2, derivative="exact").run(replace(view, simulate=broken), seeded())
    assert flash()


@pytest.mark.parametrize("selector", ["attention", "mlp", "patch", "position", "all", "qkv.weight"])
def test_only_the_selected_tensors_are_matched(selector):
    view, _, _ = make_view()
    names = Anatomy.of(view.model).select(selector, list(view.update.tensors))
    guess = Plain(iterations=2, parameters=selector).run(view, seeded())
    assert guess.details["tensors matched"] == len(names) > 0
    # Another value in a tensor that is not matched changes nothing.
    ruined = {
        k: v if k in names or "head" in k or k == "patch_embed.proj.weight" else v + 1
        for k, v in view.update.tensors.items()
    }
    other = replace(view, update=replace(view.update, tensors=ruined))
    assert torch.equal(
        guess.images, Plain(iterations=2, parameters=selector).run(other, seeded()).images
    )


def test_sealed_tensors_are_left_out_and_nothing_to_match_is_blocked():
    view, _, _ = make_view(withhold=["attention"])
    guess = Plain(iterations=2).run(view, seeded())
    assert guess.details["tensors matched"] == len(view.update.tensors)
    with pytest.raises(Blocked, match="withheld"):
        Plain(iterations=2, parameters="attention").run(view, seeded())
    with pytest.raises(Blocked):
        Plain(iterations=2).run(make_view(withhold=["all"])[0], seeded())


@pytest.mark.slow
def test_several_local_steps_are_simulated():
    view, images, _ = make_view(learning_rate=0.05, local_steps=3)
    assert view.update.kind == "difference"
    exact = Plain(iterations=1, start=Guess(images=images)).run(view, seeded())
    assert exact.details["distance"] < 1e-6
    guess = Plain(iterations=20).run(view, seeded())
    assert guess.details["distance"] < 0.5 * guess.details["distance at the start"]


def test_a_difference_of_one_step_is_matched_like_its_gradient():
    gradient, _, _ = make_view()
    difference, _, _ = make_view(learning_rate=0.1)
    runs = [
        Plain(iterations=2, parameters="mlp").run(v, seeded()).details["distance at the start"]
        for v in (gradient, difference)
    ]
    assert runs[0] == pytest.approx(runs[1], rel=1e-3)


def test_labels_that_cannot_be_inferred_are_optimised_and_it_says_so():
    view, _, labels = make_view(withhold=["head"])
    guess = Plain(iterations=40).run(view, seeded())
    assert "cannot be inferred" in guess.details["labels"]
    assert guess.labels.shape == labels.shape


def test_labels_of_the_start_are_taken_and_put_to_their_images():
    view, images, labels = make_view(batch=2)
    assert labels[0] != labels[1]
    for given in (labels, labels.flip(0)):
        guess = Plain(iterations=1, start=Guess(images, given)).run(view, seeded())
        assert guess.details["labels"] == "from the start"
        assert guess.labels.tolist() == labels.tolist()
    wrong = Plain(iterations=1, start=Guess(images, torch.tensor([4, 3]))).run(view, seeded())
    assert sorted(wrong.labels.tolist()) == [3, 4]


def test_one_start_image_stands_for_a_batch():
    view, images, _ = make_view(batch=2)
    guess = Plain(iterations=1, start=Guess(images=images[:1])).run(view, seeded())
    assert guess.images.shape == images.shape
    assert not torch.equal(guess.images[0], guess.images[1])


def test_the_row_space_holds_every_patch_and_the_search_stays_in_it():
    model = make_model(patch_size=8)  # 4 patches of 192 pixels
    view, images, _ = make_view(batch=2, model=model)
    anatomy = Anatomy.of(view.model)
    space = row_space(view, anatomy)
    assert space is not None and space.basis.shape == (192, 8)
    truth = NORMALIZATION.apply(images)
    search = Subspace(anatomy, space)
    torch.testing.assert_close(search.project(truth), truth, rtol=0, atol=1e-4)
    guess = Plain(iterations=3).run(view, seeded())
    assert guess.details["free directions per patch"] == 8
    off = Plain(iterations=3, subspace=False).run(view, seeded())
    assert "free directions per patch" not in off.details
    noisy = {k: v + 0.1 * v.std() * torch.randn_like(v) for k, v in view.update.tensors.items()}
    assert row_space(replace(view, update=replace(view.update, tensors=noisy)), anatomy) is None


def test_there_is_no_row_space_where_patches_fill_the_pixels():
    view, _, _ = make_view(batch=2)
    assert row_space(view, Anatomy.of(view.model)) is None


def test_projection_onto_one_space_per_patch_equals_least_squares():
    anatomy = Anatomy.of(make_model())
    generator = seeded()
    space = AffineSpace(
        torch.randn(16, 48, generator=generator), torch.randn(16, 48, 3, generator=generator)
    )
    images = torch.randn(2, 3, 16, 16, generator=generator)
    got = anatomy.patchify(Subspace(anatomy, space).project(images))
    for b, patch in enumerate(anatomy.patchify(images)):
        for i in range(16):
            rest = (patch[i] - space.origin[i])[:, None]
            v = torch.linalg.lstsq(space.basis[i], rest).solution
            slow = space.origin[i] + (space.basis[i] @ v)[:, 0]
            torch.testing.assert_close(got[b, i], slow, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
def test_a_start_that_proved_every_patch_leaves_nothing_to_search(optimizer):
    view, images, labels = make_view(batch=2)
    proved = torch.ones(2, Anatomy.of(view.model).patches, dtype=torch.bool)
    start = Guess(images, labels, verified=proved, details={"told_apart": 2})
    attack = Plain(iterations=50, start=start, optimizer=optimizer)
    guess = attack.run(view, seeded())
    assert guess.details["iterations"] == 1 and "nothing is left" in guess.details["schedule"]
    assert guess.details["distance"] < 1e-9 and "unfinished" not in guess.details
    torch.testing.assert_close(guess.images, images, rtol=0, atol=1e-6)
    proved[0, 0] = False
    assert replace(attack, iterations=2).run(view, seeded()).details["iterations"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("defenses", [(), (PatchShuffle(0.3),)])
def test_a_start_that_is_nearer_than_all_that_was_found_is_kept(defenses):
    view, images, labels = make_view(batch=2, defenses=defenses)
    attack = InvertingGradients(iterations=4, total_variation=1.0, start=Guess(images, labels))
    guess = attack.run(view, seeded())
    assert "the start" in guess.details["kept"]
    assert torch.equal(guess.labels, labels)
    torch.testing.assert_close(guess.images, images, rtol=0, atol=1e-5)
    noise = torch.rand(images.shape, generator=seeded(3))
    moved = replace(attack, start=Guess(noise, labels), iterations=40).run(view, seeded())
    assert "kept" not in moved.details and (moved.images - noise).abs().max() > 0.01


@pytest.mark.parametrize("spectrum", [0.0, 1.0])
def test_patches_that_the_start_proved_stay(spectrum):
    view, images, labels = make_view(batch=2)
    anatomy = Anatomy.of(view.model)
    proved = torch.zeros(2, anatomy.patches, dtype=torch.bool)
    proved[0, :9] = proved[1, 3:5] = True
    noise = torch.rand(images.shape, generator=seeded(7))
    mask = proved[..., None].expand(-1, -1, anatomy.patch_pixels)
    begin = torch.where(mask, anatomy.patchify(images), anatomy.patchify(noise))
    start = Guess(anatomy.unpatchify(begin), labels, verified=proved, details={"told_apart": 1})
    proved = proved & torch.tensor([[True], [False]])  # which image the others are of is a guess
    for restarts in (1, 2):
        plain = Plain(iterations=5, start=start, spectrum=spectrum, restarts=restarts)
        ended = anatomy.patchify(plain.run(view, seeded()).images)
        gap = (ended - begin).abs().amax(-1)
        assert gap[proved].max() < 1e-6 and gap[~proved].max() > 1e-3
    free = Plain(iterations=5, start=start, spectrum=spectrum, subspace=False)
    moved = anatomy.patchify(free.run(view, seeded()).images) - begin
    assert moved.abs().amax(-1)[proved].max() > 1e-3


def test_the_space_of_the_start_is_searched():
    view, images, _ = make_view()
    anatomy = Anatomy.of(view.model)
    patches = anatomy.patchify(NORMALIZATION.apply(images))[0]
    space = AffineSpace(patches, torch.randn(16, 48, 1, generator=seeded()))
    guess = Plain(iterations=20, start=Guess(images=images * 0 + 0.5, space=space)).run(
        view, seeded()
    )
    assert guess.details["free directions per patch"] == 1
    assert (guess.images - images).square().mean() < (0.5 - images).square().mean() / 4


def test_whitened_coordinates_decode_back_and_have_the_spectrum_of_photos():
    anatomy = Anatomy.of(make_model())
    white = torch.randn(64, 3, 16, 16, generator=seeded())
    search = Subspace(anatomy, None, spectrum=1.0)
    torch.testing.assert_close(search.decode(search.encode(white)), white, rtol=1e-4, atol=1e-4)
    power = torch.fft.rfft2(search.decode(white)).abs().mean((0, 1))
    # Amplitude falls as 1 / frequency: twice the frequency, half of it.
    assert power[0, 4] / power[0, 2] == pytest.approx(0.5, rel=0.1)
    assert power[4, 0] / power[2, 0] == pytest.approx(0.5, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", fast_for(["adam", "lbfgs"], fast=["lbfgs"]))
def test_a_whitened_search_starts_where_it_is_told_and_converges(optimizer):
    view, images, _ = make_view()
    exact = Plain(iterations=1, spectrum=1.0, optimizer=optimizer, start=Guess(images=images))
    assert exact.run(view, seeded()).details["distance at the start"] < 1e-6
    guess = Plain(iterations=4, spectrum=1.0, optimizer="lbfgs").run(view, seeded())
    assert guess.details["distance"] < 0.3 * guess.details["distance at the start"]


def test_schedules():
    assert [at(((0.0, 3.0), (0.5, 1.0)), s) for s in (0.0, 0.49, 0.5, 1.0)] == [3, 3, 1, 1]
    assert at(((0.3, 2.0),), 0.2) == 0
    step = Recipe(Cosine(), decay="step")
    assert [round(step.rate_at(s), 5) for s in (0, 0.4, 0.7, 0.9)] == [0.1, 0.01, 0.001, 0.0001]
    cosine = Recipe(Cosine(), decay="cosine")
    assert cosine.rate_at(0) == 0.1 and cosine.rate_at(0.5) == pytest.approx(0.05)


def test_langevin_noise_moves_the_run_and_repeats():
    view, _, _ = make_view()

    @dataclass(frozen=True)
    class Noisy(Plain):
        def recipe(self, view, anatomy):
            return Recipe(SquaredError(), langevin=0.5)

    first, second = (Noisy(iterations=3).run(view, seeded()).images for _ in range(2))
    assert torch.equal(first, second)

    @dataclass(frozen=True)
    class Quiet(Plain):
        def recipe(self, view, anatomy):
            return Recipe(SquaredError())

    assert not torch.equal(first, Quiet(iterations=3).run(view, seeded()).images)


def test_settings_are_plain_values():
    attack = InvertingGradients(start=Guess(torch.zeros(1, 3, 2, 2)), watch=print)
    assert attack.settings()["iterations"] == 24_000
    assert not {"start", "watch"} & set(attack.settings())
    assert hash(attack) == hash(InvertingGradients())
    assert "tensor" not in repr(attack)


@pytest.mark.parametrize(
    "values",
    [
        {"iterations": 0},
        {"restarts": 0},
        {"seconds": 0},
        {"budget": 0},
        {"seconds": float("nan")},
        {"spectrum": -1},
    ],
)
def test_settings_out_of_range_are_refused(values):
    with pytest.raises(InputError):
        Plain(**values)


@pytest.mark.slow
def test_threads_share_the_attention_switch():
    from concurrent.futures import ThreadPoolExecutor

    flash = torch.backends.cuda.flash_sdp_enabled
    views = [make_view(seed=s)[0] for s in range(4)]
    attack = Plain(iterations=4, derivative="exact")
    alone = [attack.run(v, seeded()).images for v in views]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda v: attack.run(v, seeded()).images, views))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert flash()


def test_both_derivatives_agree_with_and_without_soft_labels():
    from vitguard.attacks.matching.distances import LayerNorms, attach
    from vitguard.attacks.matching.slope import DifferenceSlope
    from vitguard.vit import math_attention

    view, images, _ = make_view()
    seen = {k: v.detach() for k, v in view.update.tensors.items()}
    before = {k: p.detach().clone() for k, p in view.objective.parameters().items()}
    scores = torch.randn(1, 5, generator=seeded(), requires_grad=True)
    for distance in (Cosine(), SquaredError(), LayerNorms()):
        for soft in (False, True):
            x = (images + 0.1 * torch.rand(images.shape, generator=seeded())).requires_grad_()
            labels = scores.softmax(-1) if soft else torch.tensor([0])
            free = [x, scores] if soft else [x]
            with math_attention():
                dummy = view.simulate(x, labels, seeded()).tensors
                exact = attach(distance, {k: dummy[k] for k in seen}, seen)
                slopes = torch.autograd.grad(exact, free)
            labels = scores.softmax(-1) if soft else torch.tensor([0])
            value = DifferenceSlope(view.objective, distance, seen)(x, labels, 0)
            torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-6)
            for got, slope in zip(torch.autograd.grad(value, free), slopes, strict=True):
                cosine = torch.cosine_similarity(got.flatten(), slope.flatten(), 0)
                assert cosine > 0.999 and 0.98 < got.norm() / slope.norm() < 1.02
    after = view.objective.parameters()
    assert all(torch.equal(p, before[k]) for k, p in after.items())
