"""What every defense must hold, built in or third party: it does what its traits say, and no less.

    from vitguard.testing import check_defense

    def test_contract():
        check_defense(MyDefense())

`python -m pytest --pyargs vitguard.testing.installed` runs it on every defense that is installed,
without a line of test code.
"""

from __future__ import annotations

import copy
import io
import logging
import math
import pickle
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vitguard.core import Batch, Update
from vitguard.defenses.base import (
    BatchDefense,
    Defense,
    Draws,
    ModelDefense,
    StepDefense,
    UpdateDefense,
    traits_of,
)
from vitguard.errors import Incompatible, Unprotected
from vitguard.guard import Guard, protect
from vitguard.registry import defense_types, parse_stack
from vitguard.testing.assertions import (
    assert_checkpoint_compatible,
    assert_eval_unchanged,
    assert_removable,
)
from vitguard.testing.contracts import check_plain
from vitguard.testing.drawn_contracts import check_draws, check_noise, check_state
from vitguard.testing.mechanisms import encodings, needles
from vitguard.testing.tried import (
    SIZES,
    batch,
    beside,
    embedded,
    first_difference,
    guarded,
    inputs,
    names,
    require_refused,
    size_for,
    small_model,
)
from vitguard.vit import canonical_parameters

__all__ = [
    "check_clip",
    "check_composes",
    "check_copies",
    "check_defense",
    "check_draws",
    "check_fails_closed",
    "check_given",
    "check_model",
    "check_names",
    "check_noise",
    "check_quiet",
    "check_spec",
    "check_state",
    "check_tokens",
    "check_values",
]


def check_defense(defense: Defense, others: Sequence[Defense] | None = None) -> None:
    """Run every check of a defense; `others` are those it must compose with, all by default."""
    check_spec(defense)
    check_model(defense)
    check_copies(defense)
    check_names(defense)
    check_tokens(defense)
    check_values(defense)
    check_noise(defense)
    check_clip(defense)
    check_given(defense)
    check_draws(defense)
    check_state(defense)
    check_fails_closed(defense)
    check_quiet(defense)
    check_composes(defense, others)


def check_spec(defense: Defense) -> None:
    """The spec of the settings gives an equal defense back."""
    if defense.name in defense_types():
        read = parse_stack(defense.spec())
        assert read == [defense], f"{defense.spec()} reads as {read}, not as {defense}"


def check_model(defense: Defense) -> None:
    """Eval mode is bit-identical, checkpoints go both ways, and remove() restores the model."""
    model, (images, _) = small_model(), batch(2)
    assert_eval_unchanged(model, images, defenses=[defense])
    assert_checkpoint_compatible(model, defenses=[defense])
    assert_removable(model, defenses=[defense])


def check_copies(defense: Defense) -> None:
    """A copy and a pickle of the protected model are protected as it is."""
    guard, (images, labels) = guarded(defense), batch(size_for(defense))
    wanted = guard.update(images * 2 - 1, labels)
    for how, model in (
        ("deepcopy", copy.deepcopy(guard.model)),
        ("pickle", pickle.loads(pickle.dumps(guard.model))),
    ):
        twin = Guard.of(model)
        twin.redraw(torch.Generator().manual_seed(0))
        assert twin.defenses == guard.defenses, f"{how} of {defense.name} has {twin.defenses}"
        update = twin.update(images * 2 - 1, labels)
        assert set(update.tensors) == set(wanted.tensors) and set(update.sealed) == set(
            wanted.sealed
        ), f"an update of a {how} under {defense.name} has other names"


def check_names(defense: Defense) -> None:
    """An update names every trained parameter once; positions and sealed names as traits say.

    Tensors have the parameter's shape and type.
    """
    guard, (images, labels) = guarded(defense), batch(size_for(defense))
    with guard.ungated():  # what the gate would have judged
        update = guard.update(images * 2 - 1, labels)
    base, where = set(canonical_parameters(small_model())), guard.anatomy.positions or ""
    named, traits = {*update.tensors, *update.sealed}, guard.traits
    extra = {n for n in named - base if not n.startswith("vitguard.")}
    assert not extra, f"an update under {defense.name} has names of no parameter: {sorted(extra)}"
    if traits.positions == "fixed":
        assert where not in update.tensors, f"{defense.name} fixes positions, yet {where} is sent"
    elif traits.positions == "withheld":
        assert where not in update.tensors, f"{defense.name} withholds {where}, yet it is sent"
    elif traits.positions == "learnable":
        assert where in named, f"positions are learnable under {defense.name}, yet {where} is gone"
    frozen = {n for n in base if traits.freezes(n)}
    assert not frozen & set(update.tensors), f"{defense.name} freezes what it sends"
    lost = base - named - {where} - frozen
    assert not lost, f"an update under {defense.name} lacks {sorted(lost)[:5]}"
    for selection in traits.sealed:
        open_ = [n for n in guard.anatomy.select(selection, named) if n in update.tensors]
        assert not open_, f"{defense.name} seals {selection}, yet {open_[:5]} can be read"
    for name, p in canonical_parameters(small_model()).items():
        sent = update.tensors.get(name, p.detach())
        got = (tuple(sent.shape), sent.dtype, sent.requires_grad)
        assert got == (tuple(p.shape), p.dtype, False), (
            f"{defense.name} sends {name} of shape {got[0]} in {got[1]}"
            f"{', with its graph' if got[2] else ''}, where the parameter has {tuple(p.shape)} in "
            f"{p.dtype}"
        )
    if not traits.sealed:
        shut = set(update.sealed) - {where}
        assert not shut, f"{defense.name} seals {sorted(shut)[:5]}, and its traits do not say so"


def check_tokens(defense: Defense) -> None:
    """Class tokens reach the blocks as they are, and no more patch tokens move than traits say."""
    if not isinstance(defense, ModelDefense):
        return
    guard, (images, _) = guarded(defense), batch(3)
    anatomy, shuffle = guard.anatomy, guard.traits.shuffle
    plain = copy.deepcopy(small_model())
    plain.load_state_dict(guard.export())
    for size in (3, 1) * 4:  # draws: a token that is moved now and then shows in one of them
        seen = images[:size]
        ours, theirs = (embedded(m, anatomy.embedded, seen) for m in (guard.model, plain))
        assert ours.shape == theirs.shape, f"{defense.name} gives the blocks {tuple(ours.shape)}"
        differs = (ours != theirs).any(-1)
        prefix = differs[:, : anatomy.prefix_tokens]
        assert not bool(prefix.any()), (
            f"{defense.name} changes the class token of {int(prefix.any(1).sum())} of {size} images"
        )
        most, moved = (shuffle.most if shuffle else 0), int(differs.sum(1).max())
        assert moved <= most, (
            f"{defense.name} changes {moved} patch tokens of an image; its traits say {most}"
        )


def check_values(defense: Defense) -> None:
    """Tensors are exact and of low rank where traits say so; zeros that are new are told.

    Of a defense of the model they are compared with the gradient of the public model, unless its
    traits say that patches are moved.
    """
    if isinstance(defense, BatchDefense):
        return
    for size in (size_for(defense, size) for size in SIZES):
        guard, plain, update = beside(defense, size)
        traits = guard.traits
        if isinstance(defense, ModelDefense) and traits.shuffle is not None:
            return
        for name, tensor in update.tensors.items():
            truth = plain.tensors[name]
            if traits.exact:
                off = float((tensor - truth).norm() / truth.norm().clamp_min(1e-12))
                assert off < 1e-4, (
                    f"{defense.name} is exact by its traits, yet {name} of a batch of {size} is "
                    f"off by {off:.3g} of its norm"
                )
            if traits.rank and tensor.dim() > 1:
                values = torch.linalg.svdvals(tensor.double().flatten(1))
                over = values[traits.rank :].sum() / values[:1].sum().clamp_min(1e-300)
                assert len(tensor) == 1 or float(over) < 1e-4, (
                    f"{defense.name} sends rank {traits.rank} by its traits, yet {name} of a batch "
                    f"of {size} has more"
                )
            if not traits.sparse:
                rounding = 1e-7 * truth.abs().max()  # a key's bias has gradient zero but for that
                new = int(((tensor == 0) & (truth.abs() > rounding)).sum())
                assert new <= 0.01 * truth.numel() + 1, (
                    f"{defense.name} zeroes {new} of {truth.numel()} entries of {name}, and its "
                    "traits do not say sparse"
                )


def check_clip(defense: Defense) -> None:
    """Where traits bound what an update tells, no update or example moves it by more than `clip`.

    Tried with gradients that are far too long; noise of one seed is the same twice and cancels.
    """
    clip = defense.settings().get("clip")
    if isinstance(defense, ModelDefense | BatchDefense) or not isinstance(clip, int | float):
        return
    if not math.isfinite(guarded(defense).traits.information):
        return
    size = size_for(defense)
    if isinstance(defense, UpdateDefense):
        plain = protect(small_model(), []).update(*inputs(size))
        made = [guarded(defense).seal(_times(plain, factor)).tensors for factor in (1e4, -1e4)]
        most, what = 2 * clip, "An update and its opposite are"
    else:
        images, labels = inputs(size + 1)
        made = []
        for count in (size, size + 1):
            found = guarded(defense).update(images[:count], labels[:count], loss=_steep).tensors
            made.append({n: count * t for n, t in found.items()})
        most, what = clip, "The sums with and without one example are"
    apart = math.hypot(*(float((t - made[1][n]).double().norm()) for n, t in made[0].items()))
    assert apart <= 1.5 * most, (  # releases are rounded to a grid
        f"{what} {apart:.3g} apart under {defense.name} with the same noise, and clip={clip:g} "
        f"allows {most:g}: something is not clipped, or not as a whole"
    )


def _steep(scores: Tensor, labels: Tensor) -> Tensor:
    return 1e4 * F.cross_entropy(scores, labels)


def _times(update: Update, factor: float) -> Update:
    return replace(update, tensors={n: factor * t for n, t in update.tensors.items()})


def check_given(defense: Defense) -> None:
    """What a defense is given stays as it was, and what it gives has the same facts.

    The tensors of an update, how it was made, the images and labels of a batch.
    """
    if isinstance(defense, BatchDefense):
        return _check_given_batch(defense)
    if not isinstance(defense, UpdateDefense):
        return
    size = size_for(defense)
    given = protect(small_model(), []).update(*inputs(size), learning_rate=0.1)
    before = {n: t.clone() for n, t in given.tensors.items()}
    guard = guarded(defense)
    with guard.ungated(), guard.rehearsing():
        sent = guard.seal(given)
    odd = first_difference(before, given.tensors)
    assert odd is None, f"{defense.name} changes {odd} of the update that it is given"
    contents = ("tensors", "sealed", "payloads", "clipped")
    lost = [k for k in vars(given) if k not in contents and getattr(given, k) != getattr(sent, k)]
    assert not lost, (
        f"{defense.name} sends an update with other facts ({', '.join(lost)}) than it was given: "
        "make it with dataclasses.replace"
    )


def _check_given_batch(defense: BatchDefense) -> None:
    images, labels = inputs(4)
    made = defense.transform(
        Batch(images.clone(), labels.clone()), Draws(torch.Generator().manual_seed(0))
    )
    given = Batch(images.clone(), labels.clone())
    defense.transform(given, Draws(torch.Generator().manual_seed(0)))
    kept = torch.equal(given.images, images) and torch.equal(given.labels, labels)
    assert kept, f"{defense.name} changes the batch that it is given"
    same = made.images.shape == images.shape and made.images.dtype == images.dtype
    assert same and len(made.labels) == len(labels), (
        f"{defense.name} makes images of {tuple(made.images.shape)} in {made.images.dtype} and "
        f"{len(made.labels)} labels of {tuple(images.shape)} in {images.dtype} and {len(labels)}"
    )
    assert bool(made.images.isfinite().all()), f"{defense.name} makes images that are not finite"
    for i, image in enumerate(made.images):
        from_ = [j for j in range(len(images)) if torch.equal(image, images[j])]
        moved = bool(from_) and i not in from_
        assert not moved or torch.equal(made.labels[i], labels[from_[0]]), (
            f"{defense.name} moves images to other places than their labels"
        )


def check_fails_closed(defense: Defense) -> None:
    """Left out of the step, or gone from the model, the defense refuses; nothing plain leaves."""
    size = size_for(defense)
    plain = protect(small_model(), []).update(*inputs(size))
    if isinstance(defense, StepDefense | BatchDefense):
        require_refused(
            lambda: guarded(defense).seal(plain), f"a plain update under {defense.name}"
        )
    if isinstance(defense, StepDefense):
        guard = guarded(defense)
        require_refused(
            lambda: guard.model.train()(inputs(2)[0]), f"plain training under {defense.name}"
        )
    guard = guarded(defense)
    guard.remove()
    require_refused(
        lambda: guard.update(*inputs(size)), f"an update after remove() of {defense.name}"
    )
    require_refused(lambda: guard.seal(plain), f"seal after remove() of {defense.name}")
    if isinstance(defense, UpdateDefense):
        sealed, update = guarded(defense).seal(plain), guarded(defense).update(*inputs(size))
        assert set(sealed.sealed) == set(update.sealed), (
            f"{defense.name} seals other names in seal() than in update()"
        )


def check_quiet(defense: Defense) -> None:
    """No repr, log, print or payload shows a tensor, no reason an image; settings are plain."""
    check_plain(defense)
    guard, said = guarded(defense), io.StringIO()
    handler, root = logging.StreamHandler(said), logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        with redirect_stdout(said):
            update = guard.update(*inputs(size_for(defense)))
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    plain = protect(small_model(), []).update(*inputs(size_for(defense)))
    for name, tensor in plain.tensors.items():
        for needle in needles(tensor.flatten()) if tensor.numel() >= 4 else ():
            written, parts = encodings(needle), update.payloads.values()
            sent = any(one in part for one in written for part in parts)
            assert not sent, f"{defense.name} sends plain values of {name} in a payload"
    images, labels = inputs(size_for(defense))
    other = guarded(defense).update(0.5 * images.flip(-1) + 0.1, labels)
    told = sorted(n for n, why in update.sealed.items() if other.sealed.get(n, why) != why)
    assert not told, f"{defense.name} tells of other images another reason why {told[:3]} is sealed"
    shown = f"{said.getvalue()} {guard!r} {guard.defenses!r} {guard.traits!r}"
    secrets = ["tensor(", *(str(t.tolist()) for t in guard.truth().values() if t.numel() > 1)]
    found = next((s for s in secrets if s in shown), None)
    assert found is None, f"{defense.name} shows {found} in a repr, a log or on the screen"


def check_composes(defense: Defense, others: Sequence[Defense] | None = None) -> None:
    """Beside every other defense it gives an update, in either order, or a reason why not."""
    for other in [t() for t in defense_types().values()] if others is None else others:
        if other.name == defense.name:
            continue
        for stack in ([defense, other], [other, defense]):
            where = " + ".join(d.name for d in stack)
            try:
                guard = protect(small_model(), stack, generator=torch.Generator().manual_seed(0))
                update = guard.update(*inputs(max(map(size_for, stack))))
            except (Incompatible, Unprotected) as error:
                assert len(str(error)) > 20, f"{where} is refused without a reason: {error}"
                continue
            folded = traits_of(guard.defenses, guard.anatomy)
            table = guard.anatomy.positions or ""
            named = {*update.tensors, *update.sealed, table}
            lost = sorted(n for n in set(names()) - named if not folded.freezes(n))
            if folded.positions == "withheld" and table not in update.sealed:
                lost.append(table)
            assert not lost, f"{where}: an update neither shows nor seals {lost[:5]}"
            for selection in folded.sealed:
                open_ = [n for n in guard.anatomy.select(selection, names()) if n in update.tensors]
                assert not open_, f"{where}: {selection} is sealed, yet {open_[:5]} can be read"


CHECKS: Mapping[str, object] = {
    name: globals()[name] for name in __all__ if name != "check_defense"
}
"""Every check on its own, by name: what `vitguard.testing.installed` runs."""
