"""The matching loop, part by part: each of these fails where that part is switched off."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest
import torch

from vitguard.attacks.dlg import DLG
from vitguard.attacks.gradvit import GradViT
from vitguard.attacks.inverting import InvertingGradients
from vitguard.attacks.matching.attack import MatchingAttack
from vitguard.attacks.matching.distances import SquaredError
from vitguard.attacks.matching.priors import Prior
from vitguard.attacks.matching.restart import Recipe
from vitguard.attacks.matching.run import Run
from vitguard.core import Guess, Update
from vitguard.errors import InputError, NotApplicable


@dataclass(frozen=True)
class Loop(MatchingAttack):
    """An attack whose recipe the test gives."""

    name: ClassVar[str] = "loop"
    terms: dict = field(default_factory=dict, compare=False)

    def recipe(self, view, anatomy):
        return Recipe(SquaredError(), **self.terms)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.slow
def test_the_best_is_returned_and_not_the_last(attacked):
    view, _ = attacked([2])
    worse = []
    for rate in (0.5, 2.0, 5.0):  # which of them ends above its best depends on the weights
        seen: list[float] = []
        loud = Loop(
            iterations=12,
            terms={"rate": rate, "signed": True},
            watch=lambda p, seen=seen: seen.append(p.terms["distance"]),
        )
        guess = loud.run(view, seeded())
        assert guess.details["distance"] == min(seen)
        worse.append(min(seen) < seen[-1])
    assert any(worse)


def test_the_step_size_follows_the_schedule(attacked):
    view, _ = attacked([2])
    images: list[torch.Tensor] = []
    attack = Loop(
        iterations=8,
        terms={"decay": "step", "signed": True, "boxed": False, "rate": 0.01},
        watch=lambda p: images.append(p.estimate()),
    )
    attack.run(view, seeded())
    moves = [float((b - a).abs().max()) for a, b in itertools.pairwise(images)]
    assert moves[-1] < 0.01 * moves[0]


def test_objectives_of_two_phases_are_not_compared(attacked):
    view, _ = attacked([2])
    seen: list[float] = []
    attack = Loop(
        iterations=20,
        terms={"weight": ((0.0, 1.0), (0.5, 100.0)), "rate": 0.05},
        watch=lambda p: seen.append(p.terms["distance"]),
    )
    assert attack.run(view, seeded()).details["distance"] <= min(seen[10:]) * 1.01
    assert min(seen[10:]) < 0.9 * min(seen[:10])


@pytest.mark.parametrize("spectrum", [0.0, 1.0])
def test_images_stay_valid_pixels(attacked, spectrum):
    view, _ = attacked([2])
    run = Run(
        Loop(iterations=3, spectrum=spectrum, subspace=False, terms={"rate": 1.0}), view, seeded()
    )
    run.go()
    pixels = view.normalization.invert(run.restarts[0].images())
    slack = 1e-5 if spectrum == 0 else 1e-4
    assert -slack <= float(pixels.min()) and float(pixels.max()) <= 1 + slack
    free = Run(
        Loop(iterations=3, subspace=False, terms={"rate": 1.0, "boxed": False}), view, seeded()
    )
    free.go()
    assert float(view.normalization.invert(free.restarts[0].images()).max()) > 1.1


def test_the_restart_of_the_smallest_distance_wins(attacked):
    view, _ = attacked([2])
    run = Run(Loop(iterations=4, restarts=4), view, seeded())
    guess = run.go()
    ends = [restart.best_distance for restart in run.restarts]
    assert guess.details["distance"] == min(ends) < max(ends)


def test_further_restarts_leave_the_start(attacked):
    view, truth = attacked([2])
    run = Run(Loop(restarts=3, start=Guess(truth)), view, seeded())
    first, second, third = (restart.images() for restart in run.restarts)
    torch.testing.assert_close(first, view.normalization.apply(truth))
    assert not torch.equal(first, second) and not torch.equal(second, third)


@pytest.mark.slow
def test_draws_of_a_shuffle_make_one_good_value_luck(small_vit, observe, photos):
    view = observe(small_vit(), photos[:2], defenses="shuffle:ratio=0.5,draw=image")
    run = Run(Loop(iterations=6, terms={"rate": 0.2}), view, seeded())
    guess = run.go()
    assert run.shuffled is None
    last = view.normalization.invert(run.restarts[0].images()).clamp(0, 1)
    assert torch.equal(guess.images, last)
    assert guess.details["distance"] != run.restarts[0].best_distance


@pytest.mark.slow
def test_dropout_is_measured_again_under_equal_draws(small_vit, observe, photo):
    view = observe(small_vit(proj_drop_rate=0.2), photo)
    run = Run(Loop(iterations=6, restarts=2, terms={"rate": 0.1}), view, seeded())
    guess = run.go()
    again = [run._distance(restart, restart.best) for restart in run.restarts]
    assert guess.details["distance"] == min(again)
    assert not set(again) & {restart.best_distance for restart in run.restarts}
    restart = run.restarts[again.index(min(again))]
    best = restart.subspace.decode(restart.best)
    assert torch.equal(guess.images, view.normalization.invert(best).clamp(0, 1))
    repeated = Loop(iterations=6, restarts=2, terms={"rate": 0.1}).run(view, seeded())
    assert torch.equal(repeated.images, guess.images)


def test_labels_are_counted_in_the_mean_gradient_of_the_steps(small_vit, observe, photos):
    labels = torch.tensor([0, 0, 1, 2])
    model = small_vit(global_pool="avg", class_token=False)
    view = observe(model, photos[:4], labels, learning_rate=1e-3, local_steps=4)
    run = Run(Loop(), view, seeded())
    assert run.label_rule == "inferred"
    assert run.restarts[0].labels.tolist() == labels.tolist()


def test_a_value_that_is_not_finite_ends_the_start_and_keeps_its_best(attacked):
    view, _ = attacked([2])
    calls: list[int] = []

    def breaks(*arguments, **known):
        calls.append(1)
        made = view.simulate(*arguments, **known)
        factor = math.nan if len(calls) > 3 else 1.0
        return replace(made, tensors={k: factor * v for k, v in made.tensors.items()})

    attack = Loop(iterations=10, derivative="exact")
    guess = attack.run(replace(view, simulate=breaks), seeded())
    assert guess.images.isfinite().all() and math.isfinite(guess.details["distance"])
    assert guess.details["unfinished"] == ["iteration 10"]
    assert "a value that is not finite: 4 of 10" in guess.details["schedule"]


def test_a_distance_that_never_is_finite_is_no_guess(attacked):
    view, _ = attacked([2])

    def broken(*arguments, **known):
        made = view.simulate(*arguments, **known)
        return replace(made, tensors={k: math.nan * v for k, v in made.tensors.items()})

    attack = Loop(iterations=3, derivative="exact")
    with pytest.raises(NotApplicable, match="never a finite number"):
        attack.run(replace(view, simulate=broken), seeded())


def test_an_interrupt_before_the_first_value_claims_none(attacked):
    view, _ = attacked([2])

    def stopped(*arguments, **known) -> Update:
        raise KeyboardInterrupt

    guess = Loop(iterations=3, derivative="exact").run(replace(view, simulate=stopped), seeded())
    assert guess.details["distance"] is guess.details["distance at the start"] is None
    assert guess.details["unfinished"] == ["iteration 3"]
    assert guess.details["schedule"] == "cut short by an interrupt: 0 of 3 iterations"


def test_a_whole_run_is_called_full_and_a_cut_one_cut(attacked):
    @dataclass(frozen=True)
    class Short(Loop):
        iterations: int = 3

    view, _ = attacked([2])
    whole = Short().run(view, seeded()).details
    assert whole["schedule"] == "the full 3 iterations" and "unfinished" not in whole
    cut = Short(iterations=24_000, seconds=0.05).run(view, seeded()).details
    assert cut["schedule"] == f"cut short by time: {cut['iterations']:,} of 24,000 iterations"
    assert cut["unfinished"] == ["iteration 24,000"]


def test_gradvit_brings_the_features_in_at_half_time(attacked):
    class Bright(Prior):
        def __call__(self, images, scene):
            return images.mean()

    view, _ = attacked([2])
    seen: list[dict[str, float]] = []
    attack = GradViT(
        iterations=6,
        restarts=1,
        features=0.2,
        network=Bright(),
        watch=lambda p: seen.append(p.terms),
    )  # fmt: skip
    attack.run(view, seeded())
    assert ["feature statistics" in terms for terms in seen] == [False] * 3 + [True] * 3


@pytest.mark.parametrize(
    ("images", "match"),
    [
        (torch.zeros(3, 3, 16, 16), "1 or 2 images"),
        (torch.zeros(2, 1, 16, 16), "of shape"),
        (torch.full((2, 3, 16, 16), math.nan), "finite images"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(attacked, images, match):
    view, _ = attacked([2, 5])
    with pytest.raises(InputError, match=match):
        InvertingGradients(iterations=1, start=Guess(images)).run(view, seeded())


def test_a_start_without_images_gives_its_labels_and_unknown_ones_are_inferred(attacked):
    view, truth = attacked([2, 5])
    none = Guess(torch.zeros(0, 3, 16, 16), torch.tensor([5, 2]))
    guess = InvertingGradients(iterations=1, start=none).run(view, seeded())
    assert guess.details["labels"] == "from the start" and sorted(guess.labels.tolist()) == [2, 5]
    told = Guess(truth, torch.tensor([2, -1]))
    guess = InvertingGradients(iterations=1, start=told).run(view, seeded())
    assert guess.details["labels"] == "inferred" and sorted(guess.labels.tolist()) == [2, 5]


def test_a_run_from_another_start_is_not_resumed(attacked, tmp_path):
    view, truth = attacked([2])
    path = str(tmp_path / "run.pt")
    InvertingGradients(iterations=2, resume=path).run(view, seeded())
    with pytest.raises(InputError, match="another start"):
        InvertingGradients(iterations=2, resume=path, start=Guess(truth)).run(view, seeded())


def test_a_file_that_cannot_be_written_is_refused_before_the_run(attacked, tmp_path):
    view, _ = attacked([2])
    seen: list[int] = []
    attack = InvertingGradients(
        iterations=2, resume=str(tmp_path / "no" / "run.pt"), watch=lambda p: seen.append(1)
    )
    with pytest.raises(InputError, match="writable"):
        attack.run(view, seeded())
    assert not seen


def test_labels_are_optimised_from_inferred_ones_where_told(attacked):
    view, _ = attacked([2, 5, 7])
    run = Run(DLG(labels="inferred"), view, seeded())
    assert run.label_rule == "optimised from inferred ones"
    chances = run.restarts[0].current_labels()
    assert sorted(chances.argmax(-1).tolist()) == [2, 5, 7]
    torch.testing.assert_close(chances.amax(-1), torch.full((3,), 0.9))
    assert DLG.fast().labels == "inferred" and DLG().labels == "random"
    assert Run(DLG(), view, seeded()).label_rule == "optimised with the images"
    with pytest.raises(InputError, match="random or inferred"):
        DLG(labels="none")
