"""What remains of every registered attack when only some tensors of an update are plain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from vitguard.attacks.base import Attack
from vitguard.core import Traits
from vitguard.defenses.base import Defense, UpdateDefense, traits_of
from vitguard.errors import Incompatible
from vitguard.registry import attack_types
from vitguard.released import Released, Remaining
from vitguard.vit import Anatomy, canonical_name, canonical_parameters

__all__ = ["refuse_given_away", "refuse_idle", "released", "remaining"]


def released(
    model: nn.Module,
    anatomy: Anatomy,
    traits: Traits,
    *,
    trained: Mapping[str, int] | None = None,
    batch_size: int = 1,
) -> Released:
    """Return which tensors of an update of `model` are plain under a stack with these traits.

    Args:
        trained: Number of values of each parameter that is trained, where `model` does not say it.
        batch_size: Images behind the update.
    """
    every = {canonical_name(n): p.numel() for n, p in model.named_parameters()}
    own = {n: p.numel() for n, p in canonical_parameters(model).items()}
    sizes = dict(own if trained is None else trained)
    sizes = {n: count for n, count in sizes.items() if not traits.freezes(n)}
    if traits.positions != "learnable":
        sizes.pop(anatomy.positions or "", None)
    chosen = {n for select in traits.sealed for n in anatomy.select(select, sizes)}
    return Released(anatomy, sizes, frozenset(sizes) - chosen, traits, every, batch_size)


def remaining(plain: Released) -> tuple[Remaining, ...]:
    """Return what every registered attack says of it, each statement once, rungs first."""
    attacks = [kind() for kind in attack_types().values() if issubclass(kind, Attack)]
    attacks.sort(key=lambda a: (a.rung is None, a.rung.exact if a.rung else 0, a.family))
    said = [one for attack in attacks for one in attack.remains(plain)]
    return tuple({one.attack: one for one in said}.values())


def refuse_given_away(model: nn.Module, anatomy: Anatomy, stack: Sequence[Defense]) -> None:
    """Raise Incompatible where a stack seals tensors and those left plain give the image away.

    At batch size 1 and by the positions of the stack; its other defenses are not counted. A stack
    that seals nothing promises nothing about what can be read, and passes.
    """
    traits = traits_of(stack, anatomy)
    if not traits.sealed or traits.accepted:
        return
    found = [r for r in remaining(released(model, anatomy, traits)) if r.gives_away]
    if found:
        names = ", ".join(f"`{r.attack}`" for r in found)
        raise Incompatible(
            f"Expected a selection that ends the exact attacks, got {'/'.join(traits.sealed)!r} "
            f"with {traits.positions} positions, which leaves {names}: "
            f"{', '.join(found[0].needs)} stay plain and give the image back. Select 'plan' or "
            "'all'; see what remains with `vitguard plan`; force=True accepts it."
        )


def refuse_idle(model: nn.Module, anatomy: Anatomy, stack: Sequence[Defense]) -> None:
    """Raise Incompatible where a defense of the update comes after all of it was sealed.

    It would have nothing to act on, and the user believe that it acts.
    """
    for place, defense in enumerate(stack):
        traits = traits_of(stack[:place], anatomy)
        if not isinstance(defense, UpdateDefense) or not traits.sealed:
            continue
        if not released(model, anatomy, traits).plain:
            first = next(d for d in stack if d.traits(Traits(), anatomy).sealed)
            raise Incompatible(
                f"Expected {defense.name} before {first.name}, got it after: all is sealed by then "
                f"and it would do nothing. Put {defense.name} first."
            )
