"""Containment: low-rank updates, each layer's rows inside the row space of its inputs."""

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from tests.conftest import CIFAR_NORMALIZATION
from tests.fast import fast_for
from vitguard.analysis import released
from vitguard.attacks.budget import Budget, CutShort, worked
from vitguard.attacks.containment import Containment, fit
from vitguard.attacks.containment.spaces import RowSpaces
from vitguard.attacks.equations.rows import Embedding
from vitguard.attacks.ladder import Ladder
from vitguard.attacks.map_fit import MaximumAPosteriori
from vitguard.attacks.robust.natural_images import NaturalImages
from vitguard.attacks.span.attack import SpanInversion
from vitguard.audit import audit
from vitguard.core import LocalTraining
from vitguard.defenses.base import UpdateDefense
from vitguard.errors import Blocked, NotApplicable
from vitguard.guard import protect
from vitguard.metrics import psnr
from vitguard.registry import parse_stack
from vitguard.testing.defense_contracts import check_values
from vitguard.vit import Anatomy


@dataclass(frozen=True)
class LowRankUpdate(UpdateDefense):
    """A defense of a third party: each matrix cut to its strongest singular values."""

    name: ClassVar[str] = "low-rank-of-a-test"
    rank: int = 4

    def traits(self, before, anatomy):
        return replace(before, exact=False, rank=self.rank)

    def seal(self, update, anatomy, draws):
        return replace(update, tensors={n: self.cut(t) for n, t in update.tensors.items()})

    def mimic(self, dummy, seen):
        return {n: self.cut(t) for n, t in dummy.items()}

    def cut(self, tensor):
        if tensor.dim() < 2 or len(tensor) == 1:
            return tensor
        left, values, right = torch.linalg.svd(tensor.flatten(1), full_matrices=False)
        r = self.rank
        return ((left[:, :r] * values[:r]) @ right[:r]).view_as(tensor)


@dataclass(frozen=True)
class MoreThanItSays(LowRankUpdate):
    """One whose traits claim a lower rank than it sends."""

    def traits(self, before, anatomy):
        return replace(before, exact=False, rank=self.rank - 1)


SLOW = pytest.mark.slow


def fixed(rank):
    return [*parse_stack("positions:kind=frozen"), LowRankUpdate(rank)]


def draw():
    return torch.Generator().manual_seed(0)


def crop(cifar, index, size=8):
    edge = (32 - size) // 2 if size > 8 else 8
    part = slice(edge, edge + size)
    return cifar[0][index : index + 1, :, part, part], cifar[1][index : index + 1]


def proved(guess):
    return guess.verified is not None and bool(guess.verified.all())


@pytest.fixture
def narrow(small_vit):
    """4 patches of 4 x 4 pixels: 192 unknowns, 5 tokens."""
    return small_vit(img_size=8, depth=3, embed_dim=64)


def lora(model, rank, *, stepped=True, targets=("qkv", "fc1")):
    """Return a model of which only adapters and head are trained, B zero unless it has stepped."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=rank, target_modules=list(targets), modules_to_save=["head"])
        adapted = peft.get_peft_model(copy.deepcopy(model), config)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name and stepped:
                torch.nn.init.normal_(parameter, std=0.02)
    return adapted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "index"),
    [(4, 1), (2, 21)],
)
def test_an_update_of_low_rank_gives_the_image_back(cifar, narrow, observe, rank, index):
    pixels, labels = crop(cifar, index)
    how = {"normalization": CIFAR_NORMALIZATION}
    control = observe(narrow, pixels, labels, defenses="positions:kind=frozen", **how)
    assert float(psnr(SpanInversion().run(control, draw()).images, pixels)) > 60
    view = observe(narrow, pixels, labels, defenses=fixed(rank), **how)
    guess = Containment().run(view, draw())
    assert float(psnr(guess.images, pixels)) > 60, guess.details
    assert proved(guess) and "unfinished" not in guess.details


def noise(view):
    made = draw()
    return {n: torch.randn(t.shape, generator=made) for n, t in view.update.tensors.items()}


def slightly_off(view):
    made = draw()
    return {
        n: t + 1e-4 * t.std(correction=0) * torch.randn(t.shape, generator=made)
        for n, t in view.update.tensors.items()
    }


@pytest.mark.parametrize("other", fast_for([noise, slightly_off], fast=[slightly_off]))  # harder
def test_nothing_is_proved_on_an_unrelated_update_and_it_is_not_finished(
    cifar, narrow, observe, other
):
    pixels, labels = crop(cifar, 1)
    view = observe(narrow, pixels, labels, defenses=fixed(4), normalization=CIFAR_NORMALIZATION)
    view.update.tensors.update(other(view))
    guess = Containment(seconds=0.4).run(view, draw())
    assert guess.verified is not None and not bool(guess.verified.any())
    assert guess.details["unfinished"]


def test_nothing_is_proved_where_one_row_that_was_held_out_is_not_contained(cifar, narrow, observe):
    pixels, labels = crop(cifar, 1)
    view = observe(narrow, pixels, labels, defenses=fixed(4), normalization=CIFAR_NORMALIZATION)
    view, anatomy = view.gradient(), Anatomy.of(view.model)
    spaces = RowSpaces(view, anatomy, 4, 16 * pixels.numel(), draw())
    at = fit.Fit(spaces, NaturalImages.of(view, anatomy), Budget.of(60.0))
    patches = anatomy.patchify(CIFAR_NORMALIZATION.apply(pixels).double())
    truth = at.prior.whiten(patches)[0]
    assert bool(fit.proved(at, truth).all())
    name, held = next(
        (n, i) for n, rows in spaces.rows.items() for i in range(len(rows))
        if i not in spaces.picks.get(n, torch.empty(0)).tolist()
    )  # fmt: skip
    spaces.rows[name][held] = spaces.rows[name][held].roll(1)
    assert not bool(fit.proved(at, truth).any())


@pytest.mark.parametrize("ring", [(3, 7), (3, 7, 11)])
def test_the_natural_order_of_patches_at_each_others_places_is_among_the_first_tried(
    cifar, small_vit, observe, ring
):
    """A descent at 16 px ended with the patches 3, 7 and 11 at each other's places."""
    pixels, labels = crop(cifar, 1, 16)
    view = observe(
        small_vit(depth=1), pixels, labels, defenses=fixed(2), normalization=CIFAR_NORMALIZATION
    ).gradient()
    anatomy = Anatomy.of(view.model)
    spaces = RowSpaces(view, anatomy, 2, pixels.numel(), draw())
    at = fit.Fit(spaces, NaturalImages.of(view, anatomy), Budget.of(60.0))
    true = anatomy.patchify(CIFAR_NORMALIZATION.apply(pixels).double())[0]
    wrong = true.clone()
    wrong[list(ring)] = true[[*ring[1:], ring[0]]]
    tried = at.reordered(at.prior.whiten(wrong[None])[0], 12)
    made = [anatomy.patchify(at.image(white)[None])[0] for white in tried]
    assert len(tried) == 12 and min(float((m - true).abs().max()) for m in made) < 1e-6
    orders = fit._moves(5)
    assert len(orders) == len({tuple(o) for o in orders.tolist()}) == 10 + 2 * 10


@SLOW
def test_nothing_is_proved_where_layers_are_of_two_images(cifar, narrow, observe):
    one, other = (
        observe(narrow, *crop(cifar, i), defenses=fixed(4), normalization=CIFAR_NORMALIZATION)
        for i in (1, 21)
    )
    for name in one.update.tensors:
        if name.startswith("blocks.1."):
            one.update.tensors[name] = other.update.tensors[name]
    guess = Containment(seconds=0.4).run(one, draw())
    assert guess.verified is not None and not bool(guess.verified.any())


@SLOW
def test_without_positions_the_order_of_patches_is_not_proved(cifar, narrow, observe):
    pixels, labels = crop(cifar, 1)
    stack = [*parse_stack("positions:kind=none"), LowRankUpdate(4)]
    view = observe(narrow, pixels, labels, defenses=stack, normalization=CIFAR_NORMALIZATION)
    guess = Containment(seconds=3).run(view, draw())
    assert guess.verified is not None and not bool(guess.verified.any())
    assert guess.details["unfinished"]


@SLOW
def test_where_equations_are_fewer_than_pixels_the_search_ends_and_proves_nothing(
    cifar, small_vit, observe
):
    pixels, labels = crop(cifar, 1)
    model = small_vit(img_size=8, depth=1, embed_dim=16, num_heads=2)
    view = observe(model, pixels, labels, defenses=fixed(1), normalization=CIFAR_NORMALIZATION)
    guess = Containment().run(view, draw())
    assert guess.details["equations"] < guess.details["unknowns"] == 192
    assert "unfinished" not in guess.details
    assert guess.verified is not None and not bool(guess.verified.any())


def test_without_low_rank_it_costs_the_ladder_nothing(cifar, narrow, observe):
    pixels, labels = crop(cifar, 1)
    for defenses in ("none", "positions:kind=frozen", "noise:scale=0.1"):
        view = observe(narrow, pixels, labels, defenses=defenses)
        assert Containment().share(view) == 0
        with pytest.raises(NotApplicable, match="sent whole"):
            Containment().run(view, draw())
    assert "containment" in Ladder().parts()


@pytest.mark.parametrize(
    ("count", "stack", "training"),
    [
        (2, "none", None),
        (1, "shuffle:ratio=0.5", None),
        (1, "none", LocalTraining(steps=2, learning_rate=0.01)),
        (1, "none", LocalTraining(steps=1, learning_rate=0.01, optimizer="adamw")),
    ],
)
def test_what_nobody_has_tried_is_cut_short_and_never_refused(
    photos, small_vit, observe, count, stack, training
):
    """A refusal could count as resistance; that nobody has tried it is no resistance."""
    defenses = [*parse_stack(stack), LowRankUpdate(4)]
    how = {} if training is None else {"training": training}
    view = observe(small_vit(), photos[:count], defenses=defenses, **how)
    with pytest.raises(CutShort, match="untried"):
        Containment().run(view, draw())


def test_its_budget_is_work_and_is_kept(cifar, narrow, observe):
    pixels, labels = crop(cifar, 1)
    view = observe(narrow, pixels, labels, defenses=fixed(2))
    before = worked()
    with pytest.raises(CutShort, match="budget"):
        Containment(seconds=0.01).run(view, draw())
    guess = Containment(seconds=0.1).run(view, draw())
    assert 1e-9 * (worked() - before) < 0.3 and guess.details["unfinished"]


def test_a_rank_that_traits_claim_is_checked_by_the_contracts():
    check_values(LowRankUpdate(4))
    with pytest.raises(AssertionError, match="rank"):
        check_values(MoreThanItSays(4))


@SLOW
def test_the_ladder_climbs_to_it_for_a_defense_of_a_third_party_and_the_audit_leaks(cifar, narrow):
    pixels, labels = crop(cifar, 1)
    report = audit(
        narrow, (pixels, labels), defenses={"low rank": fixed(2)}, attacks="ladder",
        normalization=CIFAR_NORMALIZATION,
    )  # fmt: skip
    (finding,) = (f for f in report.findings if f.defended)
    assert finding.control is not None and finding.control.verdict == "leaks"
    assert finding.verdict == "leaks" and finding.psnr is not None, finding.reason
    assert finding.details["rung"] == "containment", finding.details["rungs"]
    assert finding.psnr.max > 60


@SLOW
def test_a_search_that_found_nothing_is_never_resistance(cifar, narrow):
    pixels, labels = crop(cifar, 1)
    report = audit(
        narrow, (pixels, labels), defenses={"low rank": fixed(1)}, attacks="ladder:seconds=2",
        normalization=CIFAR_NORMALIZATION,
    )  # fmt: skip
    (finding,) = (f for f in report.findings if f.defended)
    assert finding.control is not None and finding.control.verdict == "leaks"
    assert finding.verdict == "inconclusive" and "containment" in finding.reason


@SLOW
def test_map_says_that_a_cut_has_no_derivative_and_does_not_call_itself_finished(
    cifar, narrow, observe
):
    pixels, labels = crop(cifar, 1)
    view = observe(narrow, pixels, labels, defenses=fixed(2), normalization=CIFAR_NORMALIZATION)
    with pytest.raises(NotApplicable, match="no finite derivative"):
        MaximumAPosteriori(seconds=5).run(view, draw())


@SLOW
def test_adapters_that_have_stepped_give_the_image_away(cifar, narrow, observe):
    pixels, labels = crop(cifar, 1)
    view = observe(lora(narrow, 4), pixels, labels, normalization=CIFAR_NORMALIZATION)
    assert all("lora" in n or "head" in n for n in view.update.tensors)
    assert Containment().share(view) > 0
    guess = Containment().run(view, draw())
    assert proved(guess) and float(psnr(guess.images, pixels)) > 60, guess.details


@SLOW
def test_the_ladder_climbs_to_adapters(cifar, narrow, observe):
    pixels, labels = crop(cifar, 1)
    view = observe(lora(narrow, 4), pixels, labels, normalization=CIFAR_NORMALIZATION)
    guess = Ladder().run(view, draw())
    assert guess.details["rung"] == "containment", guess.details["rungs"]
    assert proved(guess) and float(psnr(guess.images, pixels)) > 60


def test_weights_of_an_adapted_model_are_read_by_the_names_of_the_base_model(
    narrow, observe, cifar
):
    """Those of a PeftModel have wrappers in their names; its update's names have none."""
    pixels, labels = crop(cifar, 1)
    training = LocalTraining(0.01, weight_decay=0.1)
    view = observe(lora(narrow, 4), pixels, labels, training=training)
    plain = dict(narrow.named_parameters())
    for name in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc1.weight"):
        assert torch.equal(view.weight(name), plain[name].detach().double())
    assert torch.equal(
        view.bias("blocks.0.mlp.fc1"), plain["blocks.0.mlp.fc1.bias"].detach().double()
    )
    assert torch.equal(
        Embedding.of(view, Anatomy.of(view.model)).offset,
        Embedding.of(observe(narrow, pixels, labels), Anatomy.of(narrow)).offset,
    )
    gradient, bare = view.gradient(), observe(lora(narrow, 4), pixels, labels)
    for name, tensor in bare.update.tensors.items():
        assert float((gradient.update.tensors[name] - tensor).abs().max()) < 1e-4, name


def test_the_first_step_of_narrow_adapters_shows_no_rows_and_that_is_said(cifar, narrow, observe):
    pixels, labels = crop(cifar, 1)
    model = lora(narrow, 2, stepped=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    view = observe(model, pixels, labels, normalization=CIFAR_NORMALIZATION)
    assert all(not bool(t.any()) for n, t in view.update.tensors.items() if "lora_A" in n)
    with pytest.raises((NotApplicable, Blocked), match="before its first step"):
        Containment().run(view, draw())


@SLOW
def test_the_first_step_of_adapters_wider_than_the_tokens_shows_the_rows_of_b(
    cifar, narrow, observe
):
    """B's gradient is G^T X A^T: above T columns its rows lie in a span that tells."""
    pixels, labels = crop(cifar, 1)
    view = observe(
        lora(narrow, 32, stepped=False), pixels, labels, normalization=CIFAR_NORMALIZATION
    )
    guess = Containment().run(view, draw())
    assert proved(guess) and float(psnr(guess.images, pixels)) > 60, guess.details


def part(model, *trained):
    """Return the model with nothing trained but what begins so."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    return model


@pytest.mark.parametrize("block", ["blocks.2.", pytest.param("blocks.1.", marks=SLOW)])
def test_whole_matrices_of_a_later_block_alone_give_the_image_away(cifar, narrow, observe, block):
    """The last one too: 4 heads pass 9 rows, and 5 tokens are all that there are."""
    pixels, labels = crop(cifar, 1)
    model = part(narrow, block, "head.")
    view = observe(model, pixels, labels, normalization=CIFAR_NORMALIZATION)
    assert Containment().share(view) > 0
    guess = Containment().run(view, draw())
    assert proved(guess) and float(psnr(guess.images, pixels)) > 60, guess.details


@SLOW
def test_a_hidden_first_block_and_embedding_do_not_hide_the_image_from_it(cifar, narrow, observe):
    pixels, labels = crop(cifar, 1)
    stack = "encryption:select=plan"
    view = observe(narrow, pixels, labels, defenses=stack, normalization=CIFAR_NORMALIZATION)
    guess = Containment().run(view, draw())
    assert proved(guess) and float(psnr(guess.images, pixels)) > 60, guess.details


@pytest.mark.parametrize(("count", "stack"), [(2, "none"), (1, "shuffle:ratio=0.5")])
def test_later_blocks_of_what_nobody_has_tried_cost_the_ladder_nothing(
    photos, small_vit, observe, count, stack
):
    view = observe(part(small_vit(), "blocks.1."), photos[:count], defenses=stack)
    assert Containment().share(view) == 0
    with pytest.raises(NotApplicable, match="untried"):
        Containment().run(view, draw())


def test_plan_counts_the_equations_of_later_blocks_where_the_first_sends_none(narrow, small_vit):
    def said(model):
        guard = protect(copy.deepcopy(model), [])
        return Containment().remains(released(guard.model, guard.anatomy, guard.traits))

    (middle,) = said(part(narrow, "blocks.1."))
    assert middle.possible and not middle.gives_away and len(middle.needs) == 4
    rows = 5 * (3 * 59 + 251)  # tokens, times what they leave of four inputs
    assert f"192 pixels by {rows:,} equations" in middle.reason
    (last,) = said(part(narrow, "blocks.2."))
    assert last.possible and "by 664 equations" in last.reason  # 5 x 59 + 59 + 59 + 251
    (one,) = said(part(narrow, "blocks.2.mlp.fc1"))
    assert not one.possible and "by 59 equations" in one.reason
    (full,) = said(part(small_vit(embed_dim=16), "blocks.1."))
    assert not full.possible and "width exceeds" in full.reason
    assert said(part(narrow, "blocks.0.", "blocks.1.")) == said(part(narrow, "norm")) == ()


def test_plan_names_it_for_low_rank_and_for_adapters_and_not_for_whole_updates(narrow):
    def said(model, stack):
        guard = protect(copy.deepcopy(model), stack)
        plain = released(guard.model, guard.anatomy, guard.traits)
        return Containment().remains(plain)

    assert said(narrow, parse_stack("positions:kind=frozen")) == ()
    (low,) = said(narrow, fixed(2))
    assert low.possible and not low.gives_away and "blocks.0.mlp.fc1.weight" in low.needs
    (beside,) = said(lora(narrow, 2), [])
    assert beside.possible and all("lora" in name for name in beside.needs)
