"""Assertions about a protected model, for your own tests.

Each one ends in one of three ways. It returns: the property holds. It raises AssertionError with
the numbers: the property is broken. It raises `vitguard.errors.Inconclusive`: the control of the
test shows nothing, so the test could not have failed.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from vitguard import data
from vitguard.attacks.base import Attack
from vitguard.audit import audit
from vitguard.core import LocalTraining, Normalization
from vitguard.errors import Inconclusive, VitguardError, expected
from vitguard.guard import Guard, Stack, protect, stack_of
from vitguard.models import normalization_of
from vitguard.registry import GROUPS, stack_name
from vitguard.report import AuditReport
from vitguard.report.finding import LEAK_GAIN
from vitguard.testing.noted import budget, noted, pictures_folder
from vitguard.vit import Anatomy, logits_of

__all__ = [
    "assert_checkpoint_compatible",
    "assert_eval_unchanged",
    "assert_not_reconstructable",
    "assert_removable",
]

_PLAIN = (bool, int, float, str, type(None))
Grad = Callable[[], AbstractContextManager[None]]


@noted
def assert_not_reconstructable(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    defenses: Stack,
    attacks: str | Sequence[str | Attack] | None = None,
    max_gain: float = LEAK_GAIN,
    batch_size: int | None = None,
    normalization: Normalization | None = None,
    training: LocalTraining | None = None,
    seed: int = 0,
) -> AuditReport:
    """Assert that the attacks get no image back under `defenses`, and do without them.

    Control: the same attacks on the undefended model. An attack that is named must leak there; of a
    group one must.

    Args:
        model: The bare model; it is copied.
        images: Pixels in [0, 1], shape (images, channels, height, width).
        labels: Classes, shape (images,); made up where None.
        attacks: As for `audit`; the ladder by default, with the time that the budget allows.
        max_gain: dB above the best guess without information that is allowed, at most 6: above it
            an image leaks.

    Raises:
        InputError: `max_gain` is above 6.
        AssertionError: An image comes closer, or leaks otherwise; the message names a picture.
        Inconclusive: No attack works on the undefended model, or one was cut or does not apply.
    """
    if not max_gain <= LEAK_GAIN:
        raise expected(
            f"max_gain of at most {LEAK_GAIN:g} dB", max_gain,
            "What is above leaks by every verdict; to allow it all the same, ask "
            "vitguard.audit(...).gate(max_gain=...).",
        )  # fmt: skip
    if attacks is None:
        attacks = "ladder" if budget() == "full" else "ladder:seconds=10"
    attacks = attacks if isinstance(attacks, str) else list(attacks)  # it is gone through twice
    if labels is None:
        labels = data.assign_labels(len(images), Anatomy.of(model).classes)
    stack = stack_of(defenses)
    report = audit(
        model, (images, labels), defenses=stack, attacks=attacks, batch_size=batch_size,
        normalization=normalization, training=training, seed=seed,
    )  # fmt: skip
    name = stack_name(stack)
    if not stack:
        if leaking := [f for f in report.findings if f.verdict == "leaks"]:
            worst = max(leaking, key=lambda f: f.patch_psnr.max if f.patch_psnr else 0.0)
            raise AssertionError(f"There is no defense. {_told(report, worst.attack)}")
        raise Inconclusive("Expected a defense, got none, and no attack leaks without one.")
    code = report.gate(max_gain=max_gain)
    if code == 1 or any(f.verdict == "leaks" for f in report.findings if f.defended):
        worst = max(
            (f for f in report.findings if f.defended),
            key=lambda f: (f.verdict == "leaks", f.patch_psnr.max if f.patch_psnr else 0.0),
        )
        raise AssertionError(
            f"{name} is reconstructed, at most {max_gain:g} dB gain allowed. "
            f"{_told(report, worst.attack)}"
        )
    if code != 0:
        states = "; ".join(
            f"{f.attack} on {f.defense}: {f.verdict}{f' ({f.reason})' if f.reason else ''}"
            for f in report.findings
        )
        together = len(images) > 1 and batch_size is None
        do = (
            f" All {len(images)} images went into one update: try batch_size=1." if together else ""
        )
        raise Inconclusive(f"Nothing was shown of {name}. {states}.{do}")
    for attack in [attacks] if isinstance(attacks, str) else attacks:
        if isinstance(attack, str) and attack in GROUPS and attack != "ladder":
            continue
        wanted = attack.partition(":")[0] if isinstance(attack, str) else attack.name
        controls = [f.control for f in report.findings if f.defended and f.attack == wanted]
        if any(c is None or c.verdict != "leaks" for c in controls):
            raise Inconclusive(
                f"{wanted} does not work on the undefended model, so it says nothing of {name}."
            )
    return report


def _told(report: AuditReport, attack: str) -> str:
    """Return the numbers of one attack with and without the defense, and where the picture is."""
    lines = []
    for finding in report.findings:
        if finding.attack == attack:
            psnr = finding.patch_psnr
            value = "no image" if psnr is None else f"{psnr.max:.1f} dB matched-patch PSNR"
            lines.append(f"{attack} on {finding.defense}: {finding.verdict}, {value}")
    level = f"knowing nothing scores {report.baseline.patch_psnr:.1f} dB"
    return f"{'; '.join(lines)}; {level}. {_saved(report)}"


def _saved(report: AuditReport) -> str:
    folder = pictures_folder()
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
    mark = hashlib.sha256(f"{test} {report.outcome()} {report.findings}".encode()).hexdigest()[:8]
    stem = "".join(c if c.isalnum() else "-" for c in test.rpartition("::")[2])[:60] or "leak"
    path = folder / f"{stem}-{mark}.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        report.save(path)
    except (OSError, VitguardError) as error:  # the failure is what matters
        return f"No picture was saved: {error}"
    return f"Picture: {path}"


@noted
def assert_eval_unchanged(model: nn.Module, images: Tensor, *, defenses: Stack) -> None:
    """Assert that in eval mode the protected model gives the model's own output to the last bit.

    With gradients and without, of one image and of several, again, and after training passes.
    Compared is a copy of the model, never protected, with the positions of `Guard.export` where a
    defense fixed them. All other weights must be those of the model.
    Control: the output depends on the images.

    Args:
        images: Pixels in [0, 1].

    Raises:
        AssertionError: A weight or an output differs; the message says by how much.
        Inconclusive: The output is the same for other images, or the stack is empty.
    """
    guard = _protected(model, defenses)
    public, inputs = copy.deepcopy(model).eval(), _inputs(model, images)
    exported = guard.export()
    try:
        public.load_state_dict(exported)
    except RuntimeError as error:
        raise AssertionError(f"The model cannot load what {_name(defenses)} exports.") from error
    own, kept = model.state_dict(), _fixed(guard)
    if moved := [k for k, t in own.items() if k not in kept and not torch.equal(t, exported[k])]:
        raise AssertionError(
            f"{_name(defenses)} changes {len(moved)} weights of the model: {moved[:5]}."
        )
    with torch.no_grad():
        theirs, others = logits_of(public(inputs)), logits_of(public(inputs.flip(-1) * 0.5 + 0.1))
    if torch.equal(theirs, others):
        raise Inconclusive("The model's output does not depend on the images: nothing is compared.")
    for where, seen, grad in _evaluations(guard, inputs):
        with grad():
            guard.model.eval()
            ours, theirs = (logits_of(m(seen)).detach() for m in (guard.model, public))
        if not torch.equal(ours, theirs):
            differs = (ours - theirs).abs()
            raise AssertionError(
                f"{_name(defenses)} changes the output in eval mode{where}: "
                f"{int((differs != 0).sum())} of {differs.numel()} logits, by up to "
                f"{float(differs.max()):.3g}."
            )


def _evaluations(guard: Guard, inputs: Tensor) -> Iterator[tuple[str, Tensor, Grad]]:
    """Yield each way to evaluate a model, in words, with its images and its mode of gradients."""
    yield "", inputs, torch.no_grad
    yield " the second time", inputs, torch.no_grad
    yield " of one image", inputs[:1], torch.no_grad
    yield " of more images", torch.cat([inputs, inputs, inputs]), torch.no_grad
    yield " with gradients", inputs, torch.enable_grad
    yield " in inference mode", inputs, torch.inference_mode
    for _ in range(2):
        with guard.rehearsing(), torch.no_grad():
            guard.model.train()(inputs)
    yield " after training passes", inputs, torch.no_grad
    yield " after training passes, with gradients", inputs, torch.enable_grad


@noted
def assert_checkpoint_compatible(model: nn.Module, *, defenses: Stack) -> None:
    """Assert that checkpoints go both ways: same keys and shapes, strict loads, values kept.

    Control: the loaded values are other than those that were there.

    Raises:
        AssertionError: A key is missing, new or of another shape, or a value does not arrive.
        Inconclusive: The model has no values to load, or the stack is empty.
    """
    guard = _protected(model, defenses)
    original = model.state_dict()
    theirs = {k: t.shape for k, t in original.items()}
    ours = {k: t.shape for k, t in guard.export().items()}
    if theirs != ours:
        odd = sorted({k for k in {*theirs, *ours} if theirs.get(k) != ours.get(k)})
        raise AssertionError(f"{_name(defenses)} changes {len(odd)} state-dict keys: {odd[:5]}.")
    moved = {k: t + 1 if t.is_floating_point() else t for k, t in original.items()}
    if all(torch.equal(moved[k], t) for k, t in original.items()):
        raise Inconclusive("The model has no floating-point values that a load could change.")
    try:
        guard.model.load_state_dict(moved)
        copy.deepcopy(model).load_state_dict(guard.export())
    except RuntimeError as error:
        raise AssertionError(f"A strict load fails under {_name(defenses)}: {error}") from error
    kept = _fixed(guard)
    stale = [k for k, t in guard.export().items() if k not in kept and not torch.equal(t, moved[k])]
    if stale:
        raise AssertionError(
            f"{len(stale)} of {len(moved)} tensors do not take the loaded values under "
            f"{_name(defenses)}: {stale[:5]}."
        )


@noted
def assert_removable(model: nn.Module, *, defenses: Stack) -> None:
    """Assert that `remove()` gives the architecture back: modules, keys, values and hooks.

    Hooks of passes, of state dicts, of parameters and of all modules count, and so do which
    parameters are trained, the mode of each module, the names of its attributes and their values
    where they are plain (a dropout rate, a switch).

    Control: the protected model is another one than the model.

    Raises:
        AssertionError: Something is left, or is gone.
        Inconclusive: The stack is empty, so there is nothing to remove.
    """
    hooked = _global_hooks()
    guard = _protected(model, defenses)
    before = _architecture(copy.deepcopy(model))  # a copy has no hooks of parameters
    if _architecture(guard.model) == before:
        raise Inconclusive(f"{_name(defenses)} leaves nothing on the model that could be removed.")
    kept = _fixed(guard)
    guard.remove()
    after = _architecture(guard.model)
    before["all modules"], after["all modules"] = hooked, _global_hooks()
    if odd := sorted({k for k in {*before, *after} if before.get(k) != after.get(k)}):
        text = "; ".join(_changed(k, before.get(k, ()), after.get(k, ())) for k in odd)
        raise AssertionError(f"remove() does not undo {_name(defenses)}: {text[:500]}.")
    state = guard.model.state_dict()
    lost = [
        k
        for k, t in model.state_dict().items()
        if k not in state or (k not in kept and not torch.equal(t, state[k]))
    ]
    if lost or len(state) != len(model.state_dict()):
        raise AssertionError(
            f"remove() leaves {len(lost)} tensors changed or gone after {_name(defenses)}: "
            f"{lost[:5]}."
        )


def _changed(name: str, before: tuple[object, ...], after: tuple[object, ...]) -> str:
    gone, new = (
        [x for x in one if x not in two] for one, two in ((before, after), (after, before))
    )
    return f"{name or 'the model'}: {gone or 'nothing'} became {new or 'nothing'}"


def _architecture(model: nn.Module) -> dict[str, tuple[object, ...]]:
    """Return what each module and parameter is and how many hooks it has, by name."""
    found: dict[str, tuple[object, ...]] = {}
    for name, m in model.named_modules():
        hooks = {k: len(v) for k, v in vars(m).items() if k.endswith("_hooks") and v}
        own = sorted(
            f"{k}={v!r}" if isinstance(v, _PLAIN) and not k.startswith("_") else k
            for k, v in vars(m).items()
            if not k.endswith(("_hooks", "_kwargs", "_called"))
        )
        found[name] = (type(m), m.training, *sorted(hooks.items()), *own)
    for name, p in model.named_parameters():
        kinds = ("_backward_hooks", "_post_accumulate_grad_hooks")
        found[f"parameter {name}"] = p.requires_grad, *(len(getattr(p, k) or ()) for k in kinds)
    return found


def _global_hooks() -> tuple[object, ...]:
    """Return the hooks that torch runs for the modules of every model."""
    kinds = ((k, v) for k, v in vars(nn.modules.module).items() if k.startswith("_global_"))
    return tuple((k, len(v)) for k, v in kinds if isinstance(v, dict) and v)


def _protected(model: nn.Module, defenses: Stack) -> Guard:
    stack = stack_of(defenses)
    if not stack:
        raise Inconclusive("Expected a defense, got none: there is nothing to test.")
    return protect(copy.deepcopy(model), stack, generator=torch.Generator().manual_seed(0))


def _fixed(guard: Guard) -> set[str]:
    """Return the names whose values a defense sets on purpose, by its own traits."""
    own = guard.traits.positions in ("fixed", "withheld", "none")
    return {guard.anatomy.positions} if own and guard.anatomy.positions else set()


def _inputs(model: nn.Module, images: Tensor) -> Tensor:
    return normalization_of(model).apply(images).to(next(model.parameters()))


def _name(defenses: Stack) -> str:
    return stack_name(stack_of(defenses))
