"""What an adversary sees of federated rounds: messages, sums, and what sums give away together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vitguard.core import LocalTraining, Loss, Normalization, Update
from vitguard.errors import NotApplicable, expected
from vitguard.guard import Guard, protect
from vitguard.vit import Anatomy

__all__ = ["Seen", "SeenRound", "Share", "mean_of", "together", "under"]


@dataclass(frozen=True, eq=False)
class Share:
    """A client's part in what was seen.

    Args:
        client: Its name.
        weight: Its weight in the sum.
        count: Images behind it.
        names: Names of the images.
        pixels: The images, in [0, 1], shape (count, channels, height, width); None if unknown.
        labels: Their classes, shape (count,).
        mask: Positions that were shuffled, shape (count, patches).
        certain: Whether the update was made here of these very images.
        own: What the client sent, before it was sealed: it knows that itself.
    """

    client: str
    weight: float
    count: int
    names: tuple[str, ...] = ()
    pixels: Tensor | None = field(default=None, repr=False)
    labels: Tensor | None = field(default=None, repr=False)
    mask: Tensor | None = field(default=None, repr=False)
    certain: bool = True
    own: Mapping[str, Tensor] | None = field(default=None, repr=False)


@dataclass(frozen=True, eq=False)
class Seen:
    """One thing that an adversary of a round sees, or computes from what it sees.

    Args:
        name: Of the thing, for the report; one of its own among those of an audit.
        update: What can be read of it, and its public facts.
        guard: The protected model before the step. An audit reads what is public of it.
        shares: The clients behind it.
        defense: The spec of the clients' stack, "" for none; each client's where they differ.
        normalization, loss: As of the clients.
        note: What a reader must know of it, such as who can read a sum.
        alike: Whether all shares were made under the stack of `guard`. If not, no adversary here
            knows what to expect, and an audit calls nothing of it resisted.
        number: Of the round.
        earlier: The same of earlier rounds, where an adversary reads rounds together.
    """

    name: str
    update: Update
    guard: Guard
    shares: tuple[Share, ...]
    defense: str = ""
    normalization: Normalization = field(default_factory=Normalization)
    loss: Loss = F.cross_entropy
    note: str = ""
    alike: bool = True
    number: int = 0
    earlier: tuple[Seen, ...] = field(default=(), repr=False)

    @property
    def weight(self) -> float:
        """The weight of all shares together."""
        return math.fsum(s.weight for s in self.shares)


@dataclass(frozen=True, eq=False)
class SeenRound:
    """A round as an audit sees it: everything that left a machine, and what became of it.

    Args:
        number: Of the round.
        base: Version of the model that clients started from.
        version: Version after it; that of before where there is no sum.
        messages: Each client's message as the server saw it, those that it refused included.
        total: The opened sum (the weighted average); None where there is none.
        included: The clients in the sum.
        refused: Why a client is not in the sum, by its name.
        failed: Why there is no sum, "" where there is one.
        weights: What all started from, by name.
        sum_bytes: The sum as it was sent to the clients.
    """

    number: int
    base: str
    version: str
    messages: tuple[Seen, ...]
    total: Seen | None = None
    included: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    failed: str = ""
    weights: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    sum_bytes: bytes = field(default=b"", repr=False)

    def seen(self) -> tuple[Seen, ...]:
        """Return the messages and the sum."""
        return (*self.messages, *((self.total,) if self.total is not None else ()))

    def without(self, *clients: str) -> Seen:
        """Return what clients that work together see of the others: the sum less what they sent.

        Raises:
            InputError: They are not in the sum, or they are all that is in it.
            NotApplicable: There is no sum, or it is not known what they sent.
        """
        total = self._sum()
        if not all(isinstance(c, str) for c in clients):
            raise expected("names of clients", clients, 'Give them one by one: without("a", "b").')
        asked = set(clients)
        if not asked or not asked < set(self.included):
            raise expected(f"some names of clients in the sum, {self.included}", clients)
        known = [s for s in total.shares if s.client in asked]
        if missing := [s.client for s in known if s.own is None]:
            raise NotApplicable(f"it is not known what {', '.join(missing)} sent")
        left = tuple(s for s in total.shares if s.client not in asked)
        rest = {
            name: t.double() * total.weight - sum(_own(s, name) * s.weight for s in known)
            for name, t in total.update.tensors.items()
        }
        images = sum(s.count for s in left)
        name = f"{_sum_name(self.number)} less {', '.join(clients)} {_counts(images, left)}"
        return _of(self._under(total, left), name, rest, left, images)

    def alone(self, client: str) -> Seen:
        """Return the sum as the update of one client, where no other one has a gradient.

        That is what a server sees that handed all others the craft `suppression`. Of the head's
        biases nothing is left: they hold the others' labels.

        Raises:
            NotApplicable: There is no sum, the client is not in it, or weight decay moved others.
        """
        total = self._sum()
        if client not in self.included:
            raise NotApplicable(f"{client} is not in the sum of round {self.number}")
        message = next(m for m in self.messages if m.shares[0].client == client)
        if total.update.weight_decay:
            raise NotApplicable("weight decay moved the weights of clients without a gradient")
        (share,) = message.shares
        factor = total.weight / share.weight
        anatomy = Anatomy.of(message.guard.model)
        heads = tuple(f"{head}." for head in anatomy.head)
        update = total.update.seal({
            n: "it holds the labels of all clients" for n in total.update.tensors
            if n.startswith(heads) and n.endswith("bias")
        })  # fmt: skip
        tensors = {n: (t.double() * factor).to(t.dtype) for n, t in update.tensors.items()}
        update = replace(update, tensors=tensors, batch_size=share.count)
        name = f"{client} in the {_sum_name(self.number)} ({_images(share.count)})"
        return replace(message, name=name, update=update, note=total.note)

    def minus(self, other: SeenRound) -> Seen:
        """Return what two sums give away of the one client that only this one includes.

        It is that client's update exactly where the others sent the same twice: a server that asks
        for a round again, from the same model, with one client less. What the others' new batches
        and new noise change stays in it.

        Raises:
            NotApplicable: There is no such difference; the reason says why.
        """
        first, second = self._sum(), other._sum()
        if self.base != other.base:
            raise NotApplicable(
                f"rounds {self.number} and {other.number} start from another version of the model: "
                "the others' updates differ, so that the sums' difference is no client's update"
            )
        alone = [s for s in first.shares if s.client not in other.included]
        gone = [c for c in other.included if c not in self.included]
        if len(alone) + len(gone) != 1 or gone:
            raise NotApplicable(
                f"the sums of rounds {self.number} and {other.number} differ by "
                f"{len(alone) + len(gone)} clients, not by one that only round {self.number} has"
            )
        rest = {
            name: t.double() * first.weight - second.update.tensors[name].double() * second.weight
            for name, t in first.update.tensors.items()
            if name in second.update.tensors
        }
        (one,) = alone
        name = (
            f"{_sum_name(self.number)} less {_sum_name(other.number)}: {one.client} "
            f"({_images(one.count)})"
        )
        return _of(self._under(first, alone), name, rest, (one,), one.count)

    def _under(self, total: Seen, shares: Sequence[Share]) -> Seen:
        """Return the sum with the stack of the clients that are left in it."""
        of = {s.client: m for m in self.messages for s in m.shares}
        known = [of[s.client] for s in shares if s.client in of]
        return under(known, total) if len(known) == len(shares) else total

    def _sum(self) -> Seen:
        if self.total is None:
            raise NotApplicable(f"round {self.number} has no sum ({self.failed})")
        return self.total


def together(sums: Sequence[Seen]) -> Seen:
    """Return what several rounds show of the same clients as one thing: the last, with the others.

    Raises:
        InputError: There are fewer than two, or of other clients.
    """
    if len(sums) < 2 or len({tuple(s.client for s in one.shares) for one in sums}) > 1:
        raise expected("sums of the same clients in two rounds or more", f"{len(sums)} sums")
    numbers = ", ".join(str(one.number) for one in sums)
    name = f"rounds {numbers} together: {sums[-1].name}"
    return replace(sums[-1], name=name, earlier=tuple(sums[:-1]))


def under(messages: Sequence[Seen], total: Seen) -> Seen:
    """Return what is made of messages with their stack, or without any where they differ."""
    first = messages[0]
    if len({m.defense for m in messages}) == 1:
        return replace(total, guard=first.guard, defense=first.defense, alike=True)
    each = "; ".join(f"{s.client}: {m.defense or 'plain'}" for m in messages for s in m.shares)
    bare = protect(first.guard.public_model(), ())
    return replace(total, guard=bare, defense=each, alike=False)


def _of(
    total: Seen, name: str, rest: Mapping[str, Tensor], shares: tuple[Share, ...], images: int
) -> Seen:
    """Return what is left of a sum of weighted updates as the average of these shares."""
    weight = math.fsum(s.weight for s in shares)
    tensors = {k: (t / weight).to(total.update.tensors[k].dtype) for k, t in rest.items()}
    update = replace(total.update, tensors=tensors, batch_size=images)
    return replace(total, name=name, update=update, shares=shares)


def _own(share: Share, name: str) -> Tensor:
    assert share.own is not None
    return share.own[name].double()


def _sum_name(number: int) -> str:
    return f"sum of round {number}"


def _images(count: int) -> str:
    return f"{count} image" if count == 1 else f"{count} images"


def _counts(images: int, shares: Sequence[Share]) -> str:
    clients = "1 client" if len(shares) == 1 else f"{len(shares)} clients"
    return f"({_images(images)} of {clients})"


def message_name(client: str, number: int, count: int) -> str:
    """Return what a report calls a client's message."""
    return f"message of {client}, round {number} ({_images(count)})"


def total_name(number: int, shares: Sequence[Share]) -> str:
    """Return what a report calls the sum of a round."""
    return f"{_sum_name(number)} {_counts(sum(s.count for s in shares), shares)}"


def mean_of(updates: Sequence[Update], weights: Sequence[float]) -> Update:
    """Return the weighted average of what can be read of all updates, as one update.

    Where they were not made alike, nothing is said of the training.
    """
    first, whole = updates[0], math.fsum(weights)
    alike = {LocalTraining.of(u) for u in updates}
    names = [n for n in first.tensors if all(u.can_read(n) for u in updates)]
    tensors = {}
    for name in names:
        given = [u.tensors[name] for u in updates]
        if given[0].is_floating_point():
            each = [w * t.double() for w, t in zip(weights, given, strict=True)]
            tensors[name] = (torch.stack(each).sum(0) / whole).to(given[0].dtype)
    sealed = {n: why for u in updates for n, why in u.sealed.items() if n not in tensors}
    made = replace(
        first, tensors=tensors, sealed=sealed, payloads={}, clipped={},
        batch_size=sum(u.batch_size for u in updates),
    )  # fmt: skip
    return made if len(alike) == 1 else replace(made, learning_rate=None, local_steps=1)
