"""Robust forms: right estimates under the prior, and a choice that never sees the truth."""

from dataclasses import replace

import pytest
import torch

from tests.fast import fast_for
from vitguard.attacks.budget import Budget
from vitguard.attacks.cascade import Cascade
from vitguard.attacks.equations.linear import conjugate_gradients
from vitguard.attacks.evidence import mismatch, surprise
from vitguard.attacks.position import PositionInversion
from vitguard.attacks.robust import RobustPosition, RobustSpan
from vitguard.attacks.robust import attacks as robust
from vitguard.attacks.robust.natural_images import NaturalImages
from vitguard.attacks.robust.position_estimates import position_estimates
from vitguard.attacks.robust.span_estimates import Containment
from vitguard.attacks.span import SpanInversion
from vitguard.core import Guess, Normalization
from vitguard.errors import Blocked, InputError, NotApplicable
from vitguard.metrics import psnr
from vitguard.vit import Anatomy

FROZEN = "positions:kind=frozen"
CIFAR = Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
PAIRS = [(PositionInversion(), RobustPosition(), "none"), (SpanInversion(), RobustSpan(), FROZEN)]


def run(attack, view):
    return attack.run(view, torch.Generator().manual_seed(0))


def spoiled(view, spoil):
    tensors = {name: spoil(tensor) for name, tensor in view.update.tensors.items()}
    return replace(view, update=replace(view.update, tensors=tensors))


def noise(view, relative, seed=0):
    """Add noise relative to the root mean square of the whole update."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.cat([t.flatten() for t in view.update.tensors.values()])
    level = relative * float(whole.square().mean().sqrt())
    return spoiled(view, lambda t: t + level * torch.randn(t.shape, generator=generator))


def pruned(view, share=0.1):
    def spoil(tensor):
        bound = tensor.abs().flatten().kthvalue(max(1, int((1 - share) * tensor.numel()))).values
        return torch.where(tensor.abs() > bound, tensor, 0.0)

    return spoiled(view, spoil)


DAMAGES = {
    "noise": lambda v: noise(v, 1e-2),
    "strong noise": lambda v: noise(v, 1e-1),
    "bfloat16": lambda v: spoiled(v, lambda t: t.bfloat16().float()),
    "float16": lambda v: spoiled(v, lambda t: t.half().float()),
    "clipping": lambda v: spoiled(v, lambda t: 1e-2 * t),
    "pruning": pruned,
}


def chosen_and_offered(attack, view, truth, monkeypatch):
    """Return the PSNR of the attack's choice, and of each candidate it chose from."""
    offered = []

    offer = robust.Choice.offer

    def compared(choice, candidates):
        for settings, patches in candidates:
            images = view.normalization.invert(choice.anatomy.unpatchify(patches[None]))
            if images.isfinite().all():
                offered.append(float(psnr(images.clamp(0, 1), truth)))
            yield settings, patches

    monkeypatch.setattr(robust.Choice, "offer", lambda self, c: offer(self, compared(self, c)))
    return float(psnr(run(attack, view).images, truth)), offered


FEW = [("pruning", 0), ("noise", 0)]  # one choice for both attacks, and `span` takes thrice as long


@pytest.mark.parametrize(
    ("damage", "which"),
    [
        pytest.param(
            damage, which, id=f"{damage}-{('position', 'span')[which]}",
            marks=() if (damage, which) in FEW else pytest.mark.slow,
        )
        for damage in DAMAGES
        for which in (0, 1)
    ],
)  # fmt: skip
def test_the_choice_is_near_the_best_candidate_the_plain_attack_among_them(
    small_vit, observe, photo, monkeypatch, damage, which
):
    plain, strong, stack = PAIRS[which]
    view = DAMAGES[damage](observe(small_vit(), photo, defenses=stack))
    chosen, offered = chosen_and_offered(strong, view, photo, monkeypatch)
    assert min(abs(v - float(psnr(run(plain, view).images, photo))) for v in offered) < 0.01
    # above that, images make the same float32 update, and nothing tells them apart
    assert len(offered) > 5 and chosen > min(max(offered), 120) - 3


@pytest.mark.slow
@pytest.mark.parametrize(  # what damages most, and rounding: on random weights stand all of them
    ("which", "damage"),
    [(0, "strong noise"), (0, "bfloat16"), (1, "strong noise"), (1, "pruning")],
)
def test_the_median_choice_is_within_3_db_of_the_best_on_trained_weights(
    cifar_vit, cifar, observe, monkeypatch, damage, which
):
    _, strong, stack = PAIRS[which]
    gaps = []
    for i in range(10, 15):
        truth = cifar[0][i : i + 1]
        view = observe(cifar_vit, truth, cifar[1][i : i + 1], defenses=stack, normalization=CIFAR)
        chosen, offered = chosen_and_offered(strong, DAMAGES[damage](view), truth, monkeypatch)
        gaps.append(max(offered) - chosen)
    assert sorted(gaps)[2] < 3


@pytest.mark.slow
def test_containment_gains_over_plain_span_under_noise(cifar_vit, cifar, observe):
    gains = []
    for i in range(10, 15):
        truth = cifar[0][i : i + 1]
        view = observe(cifar_vit, truth, cifar[1][i : i + 1], defenses=FROZEN, normalization=CIFAR)
        view = noise(view, 1e-2, seed=i)
        robust, plain = (float(psnr(run(a, view).images, truth)) for a in PAIRS[1][1::-1])
        gains.append(robust - plain)
    assert sorted(gains)[2] > 4


@pytest.mark.slow
def test_containment_gains_over_plain_span_under_noise_on_most_photos(small_vit, observe, photos):
    gains = []
    for photo in photos.split(1):
        view = noise(observe(small_vit(), photo, defenses=FROZEN), 1e-3)
        robust, plain = (float(psnr(run(a, view).images, photo)) for a in PAIRS[1][1::-1])
        gains.append(robust - plain)
    assert sorted(gains)[2] > 3


@pytest.mark.slow
@pytest.mark.parametrize("which", fast_for([0, 1], fast=[0]), ids=["position", "span"])
def test_an_undamaged_update_stays_exact(small_vit, observe, photo, which):
    _, strong, stack = PAIRS[which]
    guess = run(strong, observe(small_vit(), photo, defenses=stack))
    assert float(psnr(guess.images, photo)) > 80
    assert guess.details["mismatch"] < 1e-3
    assert guess.details["chosen"] == "by the simulated update"


@pytest.mark.slow
def test_several_local_steps_are_read_by_both(small_vit, observe, photo):
    how = {"learning_rate": 0.01, "local_steps": 3}
    position = run(RobustPosition(), observe(small_vit(), photo, **how))
    span = run(RobustSpan(), observe(small_vit(), photo, defenses=FROZEN, **how))
    assert float(psnr(position.images, photo)) > 50
    assert float(psnr(span.images, photo)) > 30
    for guess in (position, span):
        assert guess.details["chosen"] == "by the simulated update"
        assert guess.labels.tolist() == [0]


def test_without_labels_the_noise_estimate_decides(small_vit, observe, photo):
    view = observe(small_vit(), photo, withhold=("head",))
    guess = run(RobustPosition(), noise(view, 1e-3))
    assert guess.details["chosen"] == "by the noise estimate"
    assert float(psnr(guess.images, photo)) > 30


def test_names_what_they_cannot_do_without(small_vit, observe, photo):
    with pytest.raises(Blocked, match="pos_embed"):
        run(RobustPosition(), observe(small_vit(), photo, defenses=FROZEN))
    with pytest.raises(Blocked, match="qkv"):
        run(RobustSpan(), observe(small_vit(), photo, defenses=FROZEN, withhold=("attention",)))
    view = spoiled(observe(small_vit(), photo), lambda t: t * float("nan"))
    for attack in (RobustPosition(), RobustSpan()):
        with pytest.raises(NotApplicable, match="not finite"):
            run(attack, view)


@pytest.mark.parametrize("attack", [RobustPosition, RobustSpan, Cascade])
def test_a_time_budget_must_be_positive(attack):
    with pytest.raises(InputError, match="seconds above 0"):
        attack(seconds=0)


def test_no_time_still_gives_a_candidate(small_vit, observe, photo):
    guess = run(RobustSpan(seconds=1e-6), observe(small_vit(), photo, defenses=FROZEN))
    assert guess.images.shape == photo.shape


# The prior and its solver, against slow dense forms.


def dense(operator, shape):
    size = shape[0] * shape[1]
    columns = [operator(e.view(shape)).flatten() for e in torch.eye(size, dtype=torch.float64)]
    return torch.stack(columns, 1)


def test_whitening_and_precision_are_of_one_covariance(small_vit, observe, photo):
    view = observe(small_vit(img_size=8), photo[..., :8, :8])
    prior = NaturalImages.of(view, Anatomy.of(view.model))
    shape = tuple(prior.mean.shape)
    square = (3, 8, 8)
    half = torch.stack(
        [
            (prior.colour(e.view(square)) - prior.mean).flatten()
            for e in torch.eye(192, dtype=torch.float64)
        ],
        1,
    )
    covariance = half @ half.T
    precision = dense(prior.precision, shape)
    torch.testing.assert_close(precision @ covariance, torch.eye(192, dtype=torch.float64))
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(prior.colour(prior.whiten(x)), x)
    pixels = covariance.diagonal().mean().sqrt() * 0.5  # normalised by 0.5
    assert 0.15 < float(pixels) < 0.35


def test_neighbours_go_together_and_colours_too(small_vit, observe, photo):
    view = observe(small_vit(), photo)
    anatomy = Anatomy.of(view.model)
    prior = NaturalImages.of(view, anatomy)
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(200, 3, 16, 16, generator=generator, dtype=torch.float64)
    images = torch.stack([anatomy.unpatchify(prior.colour(d) - prior.mean) for d in draws])
    spread = images.square().mean()
    at = [float((images[..., d:] * images[..., : 16 - d]).mean() / spread) for d in (1, 2, 4, 8)]
    assert at[0] > 0.6 and at == sorted(at, reverse=True) and at[3] < 0.3
    assert float((images[:, 0] * images[:, 1]).mean() / spread) == pytest.approx(0.9, abs=0.1)


def test_conjugate_gradients_solve_a_dense_system():
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(24, 24, generator=generator, dtype=torch.float64)
    matrix = half @ half.T + torch.eye(24)
    right = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    made = conjugate_gradients(
        lambda x: (matrix @ x.flatten()).view(4, 6), right, lambda r: r, tolerance=1e-12
    )
    torch.testing.assert_close(made.flatten(), torch.linalg.solve(matrix, right.flatten()))


def test_with_its_budget_spent_the_solver_stops_after_one_step():
    seen = []

    def operator(x):
        seen.append(x)
        return x * torch.arange(1.0, 25.0)

    right = torch.ones(24)
    conjugate_gradients(operator, right, lambda r: r, budget=Budget.of(0))
    assert len(seen) == 1
    conjugate_gradients(operator, right, lambda r: r)
    assert len(seen) > 10


@pytest.mark.slow
def test_the_position_estimate_is_the_dense_posterior_mean(small_vit, observe, photo):
    view = noise(observe(small_vit(img_size=8), photo[..., :8, :8]), 1e-2)
    anatomy = Anatomy.of(view.model)
    prior = NaturalImages.of(view, anatomy)
    estimates = {
        (s["rows"], s["hold"], s["errors"]): x for s, x in position_estimates(view, anatomy)
    }
    made = estimates["even", 1.0, "in patches"]
    seen = view.read("pos_embed")[0, 1:]
    target = view.read("patch_embed.proj.weight").flatten(1)
    free = target - seen.T @ torch.linalg.lstsq(seen.T, target, driver="gelsd").solution
    level = free.square().sum() / ((len(target) - 4) * 48)
    eye = torch.eye(48, dtype=torch.float64)
    normal = torch.kron(seen @ seen.T / level, eye) + dense(prior.precision, (4, 48))
    right = (seen @ (target - seen.T @ prior.mean) / level).flatten()
    slow = prior.mean + torch.linalg.solve(normal, right).view(4, 48)
    torch.testing.assert_close(made, slow, rtol=1e-4, atol=1e-4)


def test_the_true_image_is_a_fixed_point_of_containment(small_vit, observe, photo):
    view = observe(small_vit().double(), photo, defenses=FROZEN)
    anatomy = Anatomy.of(view.model)
    true = anatomy.patchify(view.normalization.apply(photo.double()))[0]
    form = Containment(view, anatomy, even=True)
    (moved,) = form.refine(true, 1.0, steps=1)
    assert float((moved - true).abs().max()) < 1e-5  # the noise of float64, amplified


@pytest.mark.slow
@pytest.mark.parametrize("relative", [1e-3, 1e-2])
def test_containment_lowers_what_it_says_it_minimises(small_vit, observe, photo, relative):
    view = noise(observe(small_vit(), photo, defenses=FROZEN), relative)
    anatomy = Anatomy.of(view.model)
    form = Containment(view, anatomy, even=True)
    norm, embed = view.model.blocks[0].norm1.double(), view.model.patch_embed.proj.double()
    position = view.model.pos_embed.double()[0]

    @torch.no_grad()
    def outside(matrix, tokens):
        onto = torch.linalg.pinv(tokens) @ tokens
        return (matrix - matrix @ onto).square().sum()

    @torch.no_grad()
    def cost(patches):
        z = torch.nn.functional.linear(patches, embed.weight.flatten(1), embed.bias) + position[1:]
        z = torch.cat([view.model.cls_token.double()[0] + position[:1], z])
        tokens = torch.cat([norm(z), torch.ones(17, 1)], 1)
        names = ("blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias")
        rows = torch.cat([view.read(names[0]), view.read(names[1])[:, None]], 1)
        pixels = view.read("patch_embed.proj.weight").flatten(1)
        away = patches - form.prior.mean
        unlikely = (away * form.prior.precision(away)).sum()
        first = outside(rows, tokens) / form.inputs.noise
        return float(first + outside(pixels, patches) / form.pixels.noise + unlikely)

    start = next(iter(form.starts(0.0, 1.0)))
    *_, end = form.refine(start, 1.0, steps=4)
    assert cost(end) < 0.02 * cost(start)


# What the choice goes by.


def test_surprise_is_least_for_the_truth_whatever_the_damage(small_vit, observe, photos):
    view = observe(small_vit(), photos[:1], torch.tensor([4]))
    true = Guess(images=photos[:1], labels=torch.tensor([4]))
    near = replace(true, images=(photos[:1] + 0.05 * torch.randn(photos[:1].shape)).clamp(0, 1))
    for damage in DAMAGES.values():
        seen = damage(view)
        assert surprise(seen, true) < surprise(seen, near)
    assert surprise(view, replace(true, labels=None)) is None


def test_pruned_entries_count_only_where_they_would_have_been_kept(small_vit, observe, photos):
    view = pruned(observe(small_vit(), photos[:1], torch.tensor([4])))
    true = Guess(images=photos[:1], labels=torch.tensor([4]))
    kept = {k: t[t != 0].abs().min() for k, t in view.update.tensors.items() if bool(t.any())}
    assert len(kept) > 10 and mismatch(view, true) < 1e-4
    ordinary = surprise(view, true)
    name = "blocks.0.mlp.fc1.weight"
    large = view.update.tensors[name].clone()
    large[large == 0] = 0.0
    large[large.abs() > 2 * kept[name]] = 0.0  # the largest were dropped: no pruning does that
    tensors = {**view.update.tensors, name: large}
    odd = replace(view, update=replace(view.update, tensors=tensors))
    assert surprise(odd, true) > ordinary
