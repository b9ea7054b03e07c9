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
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
from vitguard.defenses.privacy.verification import measure_noise
from vitguard.errors import Incompatible, Unprotected
from vitguard.guard import Guard, protect
from vitguard.registry import defense_types, parse_stack
from vitguard.testing.assertions import (
    assert_checkpoint_compatible,
    assert_eval_unchanged,
    assert_removable,
)
from vitguard.testing.contracts import check_plain
from vitguard.testing.mechanisms import encodings, needles
from vitguard.vit import Anatomy, canonical_parameters

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

SIZES = (1, 3)
"""Batch sizes of the updates that are compared: what reads one wrongly shows at two.

A defense that lets no small update leave (`least_batch`) is tried on the smallest that it does.
"""
_CHANCE = 1e-9
_BARE = 0.2  # share of entries that a draw may leave as they are, by rounding
_ROUNDING = 1e-4  # noise of so little beside the values is lost in large ones of 32 bits
_ALIKE = 0.2


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
    model, (images, _) = _model(), _batch(2)
    assert_eval_unchanged(model, images, defenses=[defense])
    assert_checkpoint_compatible(model, defenses=[defense])
    assert_removable(model, defenses=[defense])


def check_copies(defense: Defense) -> None:
    """A copy and a pickle of the protected model are protected as it is."""
    guard, (images, labels) = _guard(defense), _batch(_size(defense))
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
    guard, (images, labels) = _guard(defense), _batch(_size(defense))
    with guard.ungated():  # what the gate would have judged
        update = guard.update(images * 2 - 1, labels)
    base, where = set(canonical_parameters(_model())), guard.anatomy.positions or ""
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
    for name, p in canonical_parameters(_model()).items():
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
    guard, (images, _) = _guard(defense), _batch(3)
    anatomy, shuffle = guard.anatomy, guard.traits.shuffle
    plain = copy.deepcopy(_model())
    plain.load_state_dict(guard.export())
    for size in (3, 1) * 4:  # draws: a token that is moved now and then shows in one of them
        seen = images[:size]
        ours, theirs = (_embedded(m, anatomy.embedded, seen) for m in (guard.model, plain))
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
    for size in (_size(defense, size) for size in SIZES):
        guard, plain, update = _beside(defense, size)
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


def check_noise(defense: Defense) -> None:
    """Noise has the standard deviation that the traits claim, at more than one batch size.

    That of one tensor is not that of another, every entry has some, and where it is added to an
    update it does not follow the signs of the values.
    """
    if isinstance(defense, ModelDefense | BatchDefense):
        return
    for size in (_size(defense, size) for size in SIZES):
        guard, plain, update = _beside(defense, size)
        traits, names = guard.traits, [n for n, t in update.tensors.items() if t.numel() > 1]
        added: list[Tensor] = []
        if traits.noise > 0 and not traits.sparse and not math.isfinite(traits.information):
            added = [plain.tensors[n] for n in names if bool(plain.tensors[n].any())]
            parts = [
                (update.tensors[n] - plain.tensors[n]) / plain.tensors[n].square().mean().sqrt()
                for n in names
                if bool(plain.tensors[n].any())
            ]
            claimed = traits.noise
        elif math.isfinite(traits.information):
            clip = defense.settings().get("clip")
            if not isinstance(clip, int | float):
                continue  # nothing says how large the ball is
            again = guard.update(*_inputs(size))  # the same sum under fresh noise
            parts = [(update.tensors[n] - again.tensors[n]) / math.sqrt(2) for n in names]
            claimed = clip / math.sqrt(2 * traits.information)
            claimed /= size if isinstance(defense, StepDefense) else 1
        else:
            continue
        if not parts:
            continue
        fit = measure_noise(torch.cat([p.flatten() for p in parts]), claimed)
        sound = fit.p_value >= _CHANCE and not getattr(defense, "keep_statistics", False)
        close = abs(fit.ratio - 1) < 0.02  # rescaled to keep statistics, noise is not quite normal
        assert sound or close, (
            f"the noise of {defense.name} on a batch of {size} has {fit.ratio:.4g} times the "
            f"standard deviation that its traits claim (p = {fit.p_value:.2g})"
        )
        bare = max(float((p == 0).double().mean()) for p in parts)
        rounded = bool(added) and claimed < _ROUNDING
        assert bare < _BARE or traits.sparse or rounded, (
            f"{defense.name} leaves {bare:.0%} of the entries of a tensor as they were: its noise "
            "is on the others alone"
        )
        if added and not getattr(defense, "keep_statistics", False):
            signs = torch.cat([t.sign().flatten() for t in added])
            alike = float(F.cosine_similarity(torch.cat([p.flatten() for p in parts]), signs, 0))
            assert abs(alike) < max(_ALIKE, 6 / math.sqrt(len(signs))), (
                f"the noise of {defense.name} follows the signs of the values (cosine {alike:.2f})"
            )
        for one, other in combinations([p.flatten() for p in parts if p.numel() >= 64], 2):
            count = min(len(one), len(other))
            alike = float(F.cosine_similarity(one[:count], other[:count], 0))
            assert abs(alike) < 0.9, (
                f"{defense.name} adds the same noise to two tensors: their difference is without it"
            )


def check_clip(defense: Defense) -> None:
    """Where traits bound what an update tells, no update or example moves it by more than `clip`.

    Tried with gradients that are far too long; noise of one seed is the same twice and cancels.
    """
    clip = defense.settings().get("clip")
    if isinstance(defense, ModelDefense | BatchDefense) or not isinstance(clip, int | float):
        return
    if not math.isfinite(_guard(defense).traits.information):
        return
    size = _size(defense)
    if isinstance(defense, UpdateDefense):
        plain = protect(_model(), []).update(*_inputs(size))
        made = [_guard(defense).seal(_times(plain, factor)).tensors for factor in (1e4, -1e4)]
        most, what = 2 * clip, "An update and its opposite are"
    else:
        images, labels = _inputs(size + 1)
        made = []
        for count in (size, size + 1):
            found = _guard(defense).update(images[:count], labels[:count], loss=_steep).tensors
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
    size = _size(defense)
    given = protect(_model(), []).update(*_inputs(size), learning_rate=0.1)
    before = {n: t.clone() for n, t in given.tensors.items()}
    guard = _guard(defense)
    with guard.ungated(), guard.rehearsing():
        sent = guard.seal(given)
    odd = _first_difference(before, given.tensors)
    assert odd is None, f"{defense.name} changes {odd} of the update that it is given"
    contents = ("tensors", "sealed", "payloads", "clipped")
    lost = [k for k in vars(given) if k not in contents and getattr(given, k) != getattr(sent, k)]
    assert not lost, (
        f"{defense.name} sends an update with other facts ({', '.join(lost)}) than it was given: "
        "make it with dataclasses.replace"
    )


def _check_given_batch(defense: BatchDefense) -> None:
    images, labels = _inputs(4)
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


def check_draws(defense: Defense) -> None:
    """What is drawn repeats from the generator given to protect, and from no seed of the process.

    Noise that traits claim, and moved tokens that are drawn, are others in each process and each
    update.
    """
    seeded = [_drawn(defense, torch.Generator().manual_seed(0), process) for process in (1, 2)]
    odd = _first_difference(*seeded)
    assert odd is None, (
        f"{defense.name} draws {odd} from elsewhere than the draws that it is given: of one "
        "generator it makes two, so that no audit of it repeats, and its seed may be known"
    )
    other = _drawn(defense, torch.Generator().manual_seed(1), 1)
    try:
        secret = [_drawn(defense, None, 1) for _ in range(2)]
    except Unprotected:
        return  # it gives nothing without keys or others, but for a rehearsal
    varying = [n for n, t in seeded[0].items() if not torch.equal(t, other[n])]
    assert not varying or any(not torch.equal(secret[0][n], secret[1][n]) for n in varying), (
        f"{defense.name} draws the same in two processes with the same seeds: who knows them "
        "takes it off again"
    )
    if not _claims_noise(defense):
        return
    for name, tensor in secret[0].items():
        if not name.startswith("update 1") or tensor.numel() == 1 or not bool(tensor.any()):
            continue
        assert not torch.equal(tensor, secret[1][name]), (
            f"{defense.name} adds the same noise in two processes with the same seeds ({name})"
        )
        assert not torch.equal(tensor, secret[0][name.replace("update 1", "update 2")]), (
            f"{defense.name} adds the same noise to two updates ({name})"
        )


def _claims_noise(defense: Defense) -> bool:
    if isinstance(defense, ModelDefense | BatchDefense):
        return False
    traits = _guard(defense).traits
    return not traits.sealed and (traits.noise > 0 or math.isfinite(traits.information))


def _drawn(defense: Defense, generator: torch.Generator | None, process: int) -> dict[str, Tensor]:
    """Return what two updates hold and what the blocks got in four passes.

    Args:
        process: Seed of every generator that a process has.
    """
    with _same_process(process):
        guard = protect(_model().train(), [defense], generator=generator)
        found = {}
        for i in (1, 2):
            with guard.ungated():
                update = guard.update(*_inputs(_size(defense)))
            found |= {f"update {i}, {n}": t for n, t in update.tensors.items()}
        for i in range(4 if isinstance(defense, ModelDefense) else 0):
            found[f"tokens {i}"] = _embedded(guard.model, guard.anatomy.embedded, _batch(3)[0])
    return found


@contextmanager
def _same_process(seed: int) -> Iterator[None]:
    """Seed what a process draws from, and put it back afterwards."""
    legacy = np.random.mtrand  # what `np.random.rand` and its like draw from
    states: tuple[Any, Any] = random.getstate(), legacy.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random.seed(seed)
            legacy.seed(seed)
            yield
    finally:
        random.setstate(states[0])
        legacy.set_state(states[1])


def _first_difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str | None:
    for name in (*one, *other):
        if name not in one or name not in other or not torch.equal(one[name], other[name]):
            return name
    return None


def check_state(defense: Defense) -> None:
    """No draw is left in a state dict, nor what is secret in a copy of the model."""
    guard = protect(_model().train(), [defense])
    twin = Guard.of(copy.deepcopy(guard.model))
    for _ in range(2):  # draws of few patches are alike now and then
        for one in (guard, twin):
            for size in (3, 1, 3, 3):
                with one.rehearsing(), torch.no_grad():
                    one.model.train()(_batch(size)[0] * 2 - 1)
            with one.ungated(), suppress(Unprotected):  # keys or others are missing: none is made
                one.update(*_inputs(max(_size(defense), 3)))
        states = [
            {n: t for n, t in g.model.state_dict().items() if isinstance(t, Tensor)}
            for g in (guard, twin)
        ]
        odd = _first_difference(*states)
        assert odd is None, (
            f"{defense.name} leaves {odd} in the state dict, which tells of a draw: a checkpoint "
            "or an average would hold it"
        )
    for how, model in (
        ("deepcopy", copy.deepcopy(guard.model)),
        ("pickle", pickle.loads(pickle.dumps(guard.model))),
    ):
        left = sorted(Guard.of(model).truth())
        assert not left, f"a {how} of a model under {defense.name} holds its last draw: {left[:5]}"


def check_fails_closed(defense: Defense) -> None:
    """Left out of the step, or gone from the model, the defense refuses; nothing plain leaves."""
    size = _size(defense)
    plain = protect(_model(), []).update(*_inputs(size))
    if isinstance(defense, StepDefense | BatchDefense):
        _refused(lambda: _guard(defense).seal(plain), f"a plain update under {defense.name}")
    if isinstance(defense, StepDefense):
        guard = _guard(defense)
        _refused(lambda: guard.model.train()(_inputs(2)[0]), f"plain training under {defense.name}")
    guard = _guard(defense)
    guard.remove()
    _refused(lambda: guard.update(*_inputs(size)), f"an update after remove() of {defense.name}")
    _refused(lambda: guard.seal(plain), f"seal after remove() of {defense.name}")
    if isinstance(defense, UpdateDefense):
        sealed, update = _guard(defense).seal(plain), _guard(defense).update(*_inputs(size))
        assert set(sealed.sealed) == set(update.sealed), (
            f"{defense.name} seals other names in seal() than in update()"
        )


def check_quiet(defense: Defense) -> None:
    """No repr, log, print or payload shows a tensor, no reason an image; settings are plain."""
    check_plain(defense)
    guard, said = _guard(defense), io.StringIO()
    handler, root = logging.StreamHandler(said), logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        with redirect_stdout(said):
            update = guard.update(*_inputs(_size(defense)))
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    plain = protect(_model(), []).update(*_inputs(_size(defense)))
    for name, tensor in plain.tensors.items():
        for needle in needles(tensor.flatten()) if tensor.numel() >= 4 else ():
            written, parts = encodings(needle), update.payloads.values()
            sent = any(one in part for one in written for part in parts)
            assert not sent, f"{defense.name} sends plain values of {name} in a payload"
    images, labels = _inputs(_size(defense))
    other = _guard(defense).update(0.5 * images.flip(-1) + 0.1, labels)
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
                guard = protect(_model(), stack, generator=torch.Generator().manual_seed(0))
                update = guard.update(*_inputs(max(map(_size, stack))))
            except (Incompatible, Unprotected) as error:
                assert len(str(error)) > 20, f"{where} is refused without a reason: {error}"
                continue
            folded = traits_of(guard.defenses, guard.anatomy)
            table = guard.anatomy.positions or ""
            named = {*update.tensors, *update.sealed, table}
            lost = sorted(n for n in set(_names()) - named if not folded.freezes(n))
            if folded.positions == "withheld" and table not in update.sealed:
                lost.append(table)
            assert not lost, f"{where}: an update neither shows nor seals {lost[:5]}"
            for selection in folded.sealed:
                open_ = [
                    n for n in guard.anatomy.select(selection, _names()) if n in update.tensors
                ]
                assert not open_, f"{where}: {selection} is sealed, yet {open_[:5]} can be read"


def _refused(act: object, what: str) -> None:
    assert callable(act)
    try:
        act()
    except Unprotected:
        return
    except Exception as error:
        raise AssertionError(
            f"{what} breaks with {type(error).__name__}, not Unprotected: {error}"
        ) from error
    raise AssertionError(f"{what} is not refused")


def _size(defense: Defense, wanted: int = 2) -> int:
    """Return the images of a small update that the defense lets leave."""
    return max(wanted, defense.least_batch(Anatomy.of(_model())))


def _names() -> list[str]:
    return list(canonical_parameters(_model()))


def _beside(defense: Defense, size: int) -> tuple[Guard, Update, Update]:
    """Return a guard, the public model's update, and the one under the defense, of one batch."""
    guard = _guard(defense)
    with guard.ungated():
        update = guard.update(*_inputs(size))
    public = guard.public_model().train()
    for parameter in public.parameters():
        parameter.requires_grad_(True)
    return guard, protect(public, []).update(*_inputs(size)), update


def _embedded(model: nn.Module, where: str | None, images: Tensor) -> Tensor:
    """Return the sequence that the blocks get in training."""
    caught: list[Tensor] = []
    blocks = model.get_submodule("blocks.0")
    handle = blocks.register_forward_pre_hook(lambda module, args: caught.append(args[0].detach()))
    try:
        with _released(model), torch.no_grad():
            model.train()(images * 2 - 1)
    finally:
        handle.remove()
    return caught[0]


@contextmanager
def _released(model: nn.Module) -> Iterator[None]:
    if getattr(model, "vitguard", None) is None:
        yield
        return
    with Guard.of(model).rehearsing():
        yield


def _guard(defense: Defense) -> Guard:
    model = _model().train()
    return protect(model, [defense], generator=torch.Generator().manual_seed(0))


_BUILT: dict[str, nn.Module] = {}


def _model() -> nn.Module:
    """Return a ViT of one block, four patches and a class token; a copy of one that is kept."""
    if "vit" not in _BUILT:
        from timm.models.vision_transformer import VisionTransformer

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = VisionTransformer(
                img_size=8, patch_size=4, embed_dim=32, depth=1, num_heads=2, num_classes=3
            )
            with torch.no_grad():  # zero biases and unit gammas would hide mistakes
                for parameter in model.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
        _BUILT["vit"] = model
    return copy.deepcopy(_BUILT["vit"])


def _batch(size: int) -> tuple[Tensor, Tensor]:
    images = torch.rand(size, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return images, torch.arange(size) % 3


def _inputs(size: int) -> tuple[Tensor, Tensor]:
    images, labels = _batch(size)
    return images * 2 - 1, labels


CHECKS: Mapping[str, object] = {
    name: globals()[name] for name in __all__ if name != "check_defense"
}
"""Every check on its own, by name: what `vitguard.testing.installed` runs."""
