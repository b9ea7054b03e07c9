"""What the strategies draw is valid, varied and cheap, and shrinks to the smallest."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

from vitguard.core import Batch, Update
from vitguard.defenses.base import Defense, ModelDefense, UpdateDefense
from vitguard.defenses.noise import GradientNoise
from vitguard.defenses.positions import FixedPositions
from vitguard.defenses.shuffle import PatchShuffle
from vitguard.errors import InputError, Rejected, VitguardError
from vitguard.guard import protect
from vitguard.registry import defense_types, parse_stack, stack_name
from vitguard.testing import messages, strategies
from vitguard.testing.hypothesis_types import TYPES, register
from vitguard.vit import Anatomy, canonical_parameters

ROOT = Path(__file__).parents[2]
few = settings(
    max_examples=12, deadline=None, database=None, derandomize=True,
    suppress_health_check=list(HealthCheck), phases=(Phase.generate,),
)  # fmt: skip


def smallest(strategy, condition=lambda value: True):
    """What a failing example shrinks to."""
    shrinking = settings(few, max_examples=200, phases=(Phase.generate, Phase.shrink))
    return find(strategy, condition, settings=shrinking)


@pytest.mark.parametrize("examples", [3, pytest.param(25, marks=pytest.mark.slow)])
def test_every_model_takes_every_stack_and_batch_that_are_drawn_for_it(examples):
    @settings(few, max_examples=examples)
    @given(st.data())
    def takes(data):
        model = data.draw(strategies.vits())
        stack = data.draw(strategies.stacks(model))
        batch = data.draw(strategies.batches(model))
        guard = protect(model, stack, generator=torch.Generator().manual_seed(0))
        assert batch.images.min() >= -1 and batch.images.max() <= 1
        with guard.ungated():
            update = guard.update(batch.images, batch.labels)
        assert update.batch_size == len(batch.labels) and parse_stack(stack_name(stack)) == stack

    takes()


def drawn_names(model):
    found = set()

    @settings(few, max_examples=25)
    @given(strategies.stacks(model, each=st.sampled_from(SIMPLE), most=1))
    def draw(stack):
        found.update(d.name for d in stack)

    draw()
    return found


SIMPLE = [GradientNoise(0.5), FixedPositions(), PatchShuffle()]


@pytest.mark.parametrize("first", ["frozen", "trained"])
def test_what_one_model_cannot_take_is_not_kept_from_another_of_its_shape(first):
    """Nor given to one that cannot take it."""
    strategies._TAKEN.clear()
    kinds = {"frozen": False, "trained": True}
    for kind in sorted(kinds, key=lambda k: k != first):
        model = strategies._built(strategies.ViTShape()).requires_grad_(kinds[kind])
        try:
            found = drawn_names(model)
        finally:
            model.requires_grad_(True)
        assert found == ({d.name for d in SIMPLE} if kinds[kind] else set())


def test_batches_of_a_model_without_a_head_have_labels_too_and_its_type():
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=0
    ).bfloat16()

    @settings(few, max_examples=5)
    @given(strategies.batches(model))
    def draw(batch):
        assert len(batch.labels) == len(batch.images)
        assert batch.images.dtype == torch.bfloat16

    draw()
    with pytest.raises(InputError, match="at least one class, got 0"):
        find(strategies.labels(2, 0), lambda _: True)


def test_models_are_built_once_for_a_shape_and_never_shared():
    shape = st.just(strategies.ViTShape())
    strategies._built.cache_clear()
    one, other = smallest(strategies.vits(shape)), smallest(strategies.vits(shape))
    assert strategies._built.cache_info().misses == 1
    with torch.no_grad():
        next(one.parameters()).add_(1)
    assert not torch.equal(next(one.parameters()), next(other.parameters()))


@pytest.mark.slow
def test_a_failure_shrinks_to_a_small_vit_the_first_photo_and_a_short_stack():
    assert smallest(strategies.shapes()) == strategies.ViTShape()
    assert smallest(strategies.shapes(), lambda s: s.depth > 1) == strategies.ViTShape(depth=2)
    anatomy = Anatomy.of(smallest(strategies.vits()))
    assert (len(anatomy.blocks), anatomy.patches, anatomy.width) == (1, 4, 16)
    assert smallest(strategies.stacks()) == []
    assert len(smallest(strategies.stacks(), lambda s: len(s) > 0)) == 1
    noisy = smallest(strategies.stacks(), lambda s: any(d.name == "noise" for d in s))
    assert [d.spec() for d in noisy] == ["noise"]  # alone, and every setting at its default
    pixels = smallest(strategies.images())
    assert len(pixels) == 1 and torch.equal(pixels, smallest(strategies.images()))
    batch = smallest(strategies.batches(), lambda b: len(b.labels) > 1)
    assert batch.labels.tolist() == [0, 0]
    update = smallest(strategies.updates(), lambda u: len(u.sealed) > 0)
    assert len(update.sealed) == 1 and not update.tensors and update.kind == "gradient"


@pytest.mark.slow
def test_every_kind_of_tensor_is_drawn():
    kinds, shapes, scales = set(), set(), set()

    @settings(few, max_examples=200)
    @given(strategies.tensors())
    def collect(tensor):
        assert bool(tensor.isfinite().all())
        kinds.add(tensor.dtype)
        shapes.add("scalar" if not tensor.dim() else "empty" if not tensor.numel() else "some")
        if tensor.is_floating_point() and tensor.numel():
            scales.add("zero" if not tensor.any() else "large" if tensor.abs().max() > 50 else "")

    collect()
    assert kinds == set(strategies.KINDS)
    assert shapes == {"scalar", "empty", "some"} and scales == {"zero", "large", ""}


@pytest.mark.slow
def test_every_installed_defense_is_drawn_and_settings_differ_from_their_defaults():
    found, changed = set(), set()

    @settings(few, max_examples=300)
    @given(strategies.defenses())
    def collect(defense):
        found.add(defense.name)
        if ":" in defense.spec():
            changed.add(defense.name)
        assert parse_stack(defense.spec()) == [defense]

    collect()
    assert found == set(defense_types())
    assert changed >= {"noise", "pruning", "shuffle", "privacy", "gate", "positions"}


@few
@given(strategies.gradients())
def test_a_gradient_has_the_names_and_shapes_of_its_model(update):
    names = canonical_parameters(strategies._built(strategies.ViTShape()))
    assert {n: t.shape for n, t in update.tensors.items()} == {n: p.shape for n, p in names.items()}


@dataclass(frozen=True)
class Mine(UpdateDefense):
    """A defense of one's own that is not installed."""

    name: ClassVar[str] = "mine"
    strength: float = 1.0

    def seal(self, update, anatomy, draws):
        return update


def test_a_defense_that_is_not_installed_is_drawn_by_its_class():
    drawn = smallest(strategies.defenses(Mine), lambda d: d.strength != 1.0)
    assert drawn == Mine(0.5)


def test_the_drawn_images_are_photos_not_noise():
    pixels = smallest(strategies.images((16, 16)))
    rough = (pixels[..., 1:] - pixels[..., :-1]).std() / pixels.std()
    assert rough < 0.8  # of white noise it is 1.4


# messages


@few
@given(st.data())
def test_an_honest_message_is_added_and_every_mutation_of_it_is_refused(data):
    message = data.draw(messages.encrypted())
    aggregator = message.aggregator()
    with pytest.raises(Rejected):
        aggregator.add(data.draw(messages.mutated(message.data)))
    assert aggregator.clients == ()
    aggregator.add(message.data)
    assert aggregator.clients == (message.client,)


@settings(few, max_examples=40)
@given(st.data())
def test_what_an_insider_forges_is_refused_in_words_or_is_a_message_of_his_own(data):
    message = data.draw(messages.encrypted())
    aggregator = message.aggregator()
    try:
        aggregator.add(data.draw(messages.forged(message)))
    except VitguardError:
        assert aggregator.clients == ()
    else:
        assert aggregator.clients == (message.client,)


# st.from_type


def test_types_are_known_whether_they_were_imported_before_or_after():
    register()
    assert isinstance(smallest(st.from_type(Update)), Update)
    assert isinstance(smallest(st.from_type(Batch)), Batch)
    assert isinstance(smallest(st.from_type(Defense)), Defense)
    assert isinstance(smallest(st.from_type(ModelDefense)), ModelDefense)
    from_class = smallest(st.from_type(Defense), lambda d: isinstance(d, UpdateDefense))
    assert isinstance(from_class, UpdateDefense)


START = """
import sys
import hypothesis
from hypothesis import strategies as st
assert not {"torch", "numpy", "vitguard.core", "vitguard.registry"} & set(sys.modules), "start"
"""
SCRIPT = """
import vitguard as vg
from vitguard.core import Batch
settings = hypothesis.settings(max_examples=5, deadline=None, database=None)
assert "vitguard.testing.strategies" not in sys.modules
for kind in (vg.Update, Batch):
    found = hypothesis.find(st.from_type(kind), lambda value: True, settings=settings)
    assert isinstance(found, kind)

@hypothesis.settings(settings)
@hypothesis.given(...)
def takes(update: vg.Update, batch: Batch):
    assert len(batch.images) == len(batch.labels)

takes()
print("done")
"""


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(START + 'print("done")', id="loads no torch"),
        pytest.param(START + SCRIPT, id="makes from_type work", marks=pytest.mark.slow),
    ],
)
def test_the_entry_point_loads_no_torch_and_makes_from_type_work(tmp_path, script):
    info = tmp_path / "vitguardtypes-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vitguardtypes\nVersion: 0.1\n")
    text = (ROOT / "pyproject.toml").read_text()
    section = text.partition("[project.entry-points.hypothesis]\n")[2].partition("\n\n")[0]
    (info / "entry_points.txt").write_text("[hypothesis]\n" + section.replace('"', "") + "\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "error::hypothesis.errors.HypothesisWarning", "-c", script],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "done\n", done.stderr


def test_every_type_that_is_registered_exists_and_has_a_strategy():
    import importlib

    for module, names in TYPES.items():
        for name in names:
            kind = getattr(importlib.import_module(module), name)
            assert isinstance(strategies.for_type(kind), hypothesis.strategies.SearchStrategy)
