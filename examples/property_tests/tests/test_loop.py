"""What leaves our training loop keeps our promises, for every stack and batch that is drawn."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from my_training.loop import RATE, STACK, local_round

import vitguard as vg
from vitguard.defenses.base import ModelDefense, StepDefense, UpdateDefense
from vitguard.testing import (
    assert_checkpoint_compatible,
    assert_eval_unchanged,
    assert_fails_closed,
    assert_not_reconstructable,
    assert_removable,
    assert_round_trip,
    strategies,
)

pytestmark = pytest.mark.vitguard
drawn = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))


def seeded():
    return torch.Generator().manual_seed(0)


@st.composite
def rounds(draw):
    """A small model, a stack that our loop can run, and one or two batches."""
    model = draw(strategies.vits(strategies.shapes(depth=2)))
    each = strategies.defenses(ModelDefense, UpdateDefense)
    stack = draw(strategies.stacks(model, each=each, most=2))
    batches = draw(st.lists(strategies.batches(model), min_size=1, max_size=2))
    return model, stack, [(b.images, b.labels) for b in batches]


@drawn
@given(rounds())
def test_what_leaves_has_the_models_names_and_survives_a_file(drawn_round):
    model, stack, batches = drawn_round
    names = set(model.state_dict())
    update = local_round(model, batches, stack, seeded())
    left = {n for n in (*update.tensors, *update.sealed) if not n.startswith("vitguard.")}
    assert left and left <= names
    assert_round_trip(update)


@drawn
@given(rounds())
def test_positions_never_leave_under_a_stack_that_says_so(drawn_round):
    model, stack, batches = drawn_round
    guard = vg.protect(copy.deepcopy(model), stack, generator=seeded())
    update = local_round(model, batches, stack, seeded())
    if guard.traits.positions != "learnable":
        assert "pos_embed" not in update.tensors


def test_our_stack_keeps_the_model_what_it_is(vit, photos):
    assert_eval_unchanged(vit, photos, defenses=STACK)
    assert_checkpoint_compatible(vit, defenses=STACK)
    assert_removable(vit, defenses=STACK)


def test_our_stack_holds_against_span_inversion(vit, photos):
    assert_not_reconstructable(
        vit, photos[:1], defenses=STACK, attacks=["position", "span"],
        training=vg.LocalTraining(RATE),
    )  # fmt: skip


def test_a_round_in_eval_mode_sends_nothing(vit, photos):
    batch = photos * 2 - 1, torch.arange(len(photos))
    shuffled = "shuffle:ratio=0.5"
    assert_fails_closed(
        lambda: local_round(copy.deepcopy(vit).eval(), [batch], shuffled),
        control=lambda: local_round(copy.deepcopy(vit).train(), [batch], shuffled),
    )


def test_our_loop_refuses_what_needs_every_examples_gradient(vit, photos):
    """Differential privacy wants our loader as well, and says so."""
    private = vg.DifferentialPrivacy(noise=1.0)
    assert isinstance(private, StepDefense)
    batch = photos * 2 - 1, torch.arange(len(photos))
    assert_fails_closed(
        lambda: local_round(copy.deepcopy(vit).train(), [batch], [private]),
        control=lambda: local_round(copy.deepcopy(vit).train(), [batch], []),
    )
