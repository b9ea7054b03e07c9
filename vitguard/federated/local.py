"""A whole federated round in one process, for tests and for audits of what it gives away."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, SupportsFloat

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitguard.audit.seen import Seen, SeenRound, Share, mean_of, message_name, total_name, under
from vitguard.core import LocalTraining, Loss, Normalization, Update
from vitguard.defenses.base import Defense
from vitguard.defenses.encryption import EncryptedGradients, Manifest, model_version
from vitguard.defenses.protection import Protection
from vitguard.errors import Rejected, VitguardError, expected
from vitguard.federated.schemes import Encrypted, Masked, Plain, Remembered, Scheme, sealing_of
from vitguard.guard import Guard, Stack, protect, stack_of
from vitguard.guard.leaving import names_by_values
from vitguard.models import normalization_of
from vitguard.numbers import plain_number
from vitguard.registry import stack_name
from vitguard.rounds import next_version
from vitguard.threats import Threat
from vitguard.vit import canonical_name

__all__ = ["LocalClient", "LocalFederation"]


@dataclass(frozen=True, eq=False)
class LocalClient:
    """A client of a local round: its images, and how it trains.

    Args:
        images: Pixels in [0, 1], shape (images, channels, height, width).
        labels: Class indices, shape (images,).
        weight: In the average; the number of images by default.
        defenses: Its own stack, in place of the federation's.
        train: Called with the client's guard in place of the steps of `training` on all images:
            it trains `guard.model` in place, in any way.
        training: What `train` does, as far as full steps on these images describe it, for the
            control of an audit. None says that nobody can repeat it.
    """

    images: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    weight: SupportsFloat | None = None
    defenses: Stack | None = None
    train: Callable[[Guard], object] | None = None
    training: LocalTraining | None = None

    def __post_init__(self) -> None:
        for what, given in (("images", self.images), ("labels", self.labels)):
            if not isinstance(given, Tensor):
                raise expected(f"{what} as a tensor", type(given).__name__)
        if self.weight is None and not len(self.images):
            raise expected("at least one image of a client, or its weight", "none of both")
        finite = self.images[self.images.isfinite()]
        if len(finite) and (float(finite.min()) < 0 or float(finite.max()) > 1):
            low, high = float(finite.min()), float(finite.max())
            do = "Divide by 255." if low >= 0 and 3 < high <= 255 else "Undo the normalisation."
            raise expected("pixels in [0, 1]", f"values from {low:.3g} to {high:.3g}", do)
        weight = plain_number(self.weight)
        object.__setattr__(self, "weight", weight)
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if weight is not None and not (number and 0 < weight < math.inf):
            raise expected(
                "a finite weight above 0", repr(self.weight)[:80],
                "None stands for the number of images; a client that is not to count is left out "
                "of the round: federation.round([...]).",
            )  # fmt: skip


class LocalFederation:
    """Clients and a server in one process, by the same guards, messages and sums as real ones.

    What leaves a client leaves as from a real one: sealed by its guard inside `Guard.round`, added
    by `Aggregator` or `MaskingServer`, opened by `Decryptor` or `SumOpener`; keys are made by the
    way. Whatever a client or the server refuses is named in the round, and the others go on.

    Args:
        model: The bare model that all start from; it is copied.
        clients: Clients by name.
        defenses: The stack of each client. `encryption` or `masking` in it makes a secure sum.
        training: How each client trains on all its images, with a rate; by default one step of
            rate 0.01.
        bound: The largest absolute value of an update, for the manifest of a secure sum.
        normalization: From pixels to model input; what the model's configuration says by default.
        threat: A server that may hand out weights of its own making, other ones to each client and
            in each round. Then it keeps its own model: no round moves that on. None for a server
            that hands out the shared model.
        generator: Makes the defenses' draws a function of its state, for tests and audits: no
            guarantee of privacy holds then. Keys and masks are always secret.

    Raises:
        InputError: There are no clients, training without a rate, or both kinds of secure sum.
        Incompatible: The defenses cannot work on this model.
    """

    def __init__(
        self,
        model: nn.Module,
        clients: Mapping[str, LocalClient],
        defenses: Stack = (),
        *,
        training: LocalTraining | None = None,
        bound: float | Mapping[str, float] = 1.0,
        loss: Loss = F.cross_entropy,
        normalization: Normalization | None = None,
        threat: Threat | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(clients, Mapping):
            kind = type(clients).__name__
            raise expected("clients by name", kind, 'Give {"ana": LocalClient(...)}.')
        if not clients:
            raise expected("clients by name", "none")
        for name, client in clients.items():
            if not isinstance(client, LocalClient):
                raise expected(f"a LocalClient for {name}", type(client).__name__)
            if client.training is not None and client.training.learning_rate is None:
                raise expected(f"training of {name} with a learning rate", "a gradient")
        training = training or LocalTraining(0.01)
        if training.learning_rate is None:
            raise expected("local training with a learning rate", "a gradient")
        self.model, self.clients = model, dict(clients)
        self.number = 0
        """Of the next round."""
        self._training, self._loss, self._threat = training, loss, threat
        self._normalization = normalization or normalization_of(model)
        stack = stack_of(defenses)
        self._stacks = {
            n: stack if c.defenses is None else stack_of(c.defenses) for n, c in clients.items()
        }
        self._weights = {
            n: float(len(c.images) if c.weight is None else c.weight) for n, c in clients.items()
        }
        self._scheme = self._scheme_of(stack, bound)
        self._kept: dict[str, dict[str, Tensor]] = {n: {} for n in clients}
        self.guards = {n: self._guard(n, generator) for n in clients}
        """The guard of each client; its ledger goes on from round to round."""
        first = next(iter(self.guards.values()))
        state = {canonical_name(k): t for k, t in first.model.state_dict().items()}
        self.weights = {n: state[n].detach().clone() for n in first.shared_names()}
        """The model that the clients share, by name."""
        self._twins = names_by_values(first.model)
        # what a defense drew once, such as fixed positions, is the same for all
        self._drawn = {
            k: t.detach().clone()
            for k, t in first.model.state_dict().items()
            if k.startswith("vitguard.") and k not in self.weights and t.is_floating_point()
        }
        self.version = model_version(self.weights)

    def __repr__(self) -> str:
        return f"LocalFederation({list(self.clients)}, round {self.number})"

    def run(self, rounds: int) -> list[SeenRound]:
        """Run so many rounds of all clients."""
        return [self.round() for _ in range(rounds)]

    def round(self, clients: Sequence[str] | None = None, *, advance: bool = True) -> SeenRound:
        """Run one round and return everything that left a machine.

        Args:
            clients: Who takes part; all by default.
            advance: Whether the model moves on. Without it the next round starts from the same
                version, as one does that a server asks for again.
        """
        there = list(self.clients if clients is None else clients)
        if not there or len({*there}) < len(there) or not {*there} <= self.clients.keys():
            raise expected(f"names of clients among {list(self.clients)}, each once", there)
        number = self.number
        self.number += 1
        versions = {name: self._hand_out(name, number) for name in there}
        base = next(iter(versions.values()))
        if not self._scheme.binds:  # it takes each message for one of the version it wants
            versions = dict.fromkeys(there, base)
        made = SeenRound(number, base, base, (), weights=dict(self.weights))
        try:
            self._scheme.begin(number, base, {n: self._weights[n] for n in there}, versions)
        except VitguardError as error:
            return replace(made, failed=str(error))
        messages: dict[str, Seen] = {}
        included: dict[str, Seen] = {}
        refused: dict[str, str] = {}
        for name in there:
            try:
                messages[name] = self._message(name, number, versions[name])
                _check_plain(messages[name].update)
                self._scheme.add(name, messages[name].update)
                included[name] = messages[name]
            except VitguardError as error:
                refused[name] = str(error)
        made = replace(made, messages=tuple(messages.values()), refused=refused)
        try:
            sum_bytes, opened = self._scheme.finish()
        except VitguardError as error:
            return replace(made, failed=str(error))
        total, plain = self._total(number, list(included.values()), opened)
        sum_bytes = model_version(plain).encode() + sum_bytes
        version = next_version(base, sum_bytes)
        if advance and base == self.version:
            self.version = version
            self.weights = {n: self._moved(n, total.update.tensors) for n in self.weights}
        return replace(
            made, total=total, included=tuple(included), sum_bytes=sum_bytes, version=version
        )

    def _moved(self, name: str, changes: Mapping[str, Tensor]) -> Tensor:
        """Return a weight after a sum, in which a tied one may stand by another of its names."""
        before = self.weights[name]
        there = next((n for n in (name, *self._twins.get(name, ())) if n in changes), None)
        return before if there is None else before + changes[there].to(before.dtype)

    def _total(
        self, number: int, messages: Sequence[Seen], opened: Mapping[str, Tensor]
    ) -> tuple[Seen, dict[str, Tensor]]:
        """Return the sum as those see it who may open it, and what of it was plain."""
        shares = tuple(s for m in messages for s in m.shares)
        mean = mean_of([m.update for m in messages], [m.weight for m in messages])
        plain = dict(mean.tensors)
        sealed = {n: why for n, why in mean.sealed.items() if n not in opened}
        update = replace(mean, tensors={**plain, **opened}, sealed=sealed)
        return replace(
            under(messages, messages[0]), name=total_name(number, shares), update=update,
            shares=shares, note=self._scheme.opened_by,
        ), plain  # fmt: skip

    def _hand_out(self, name: str, number: int) -> str:
        """Load what a client is handed, and return the version that it makes of that."""
        guard = self.guards[name]
        own = guard.model.state_dict()
        given = {k: t for k in own for n, t in self.weights.items() if canonical_name(k) == n}
        drawn = {k: t for k, t in self._drawn.items() if k in own}
        guard.model.load_state_dict({**own, **given, **drawn})
        threat = None if self._threat is None else self._threat.at(number, name)
        written = None if threat is None else threat.hand_out(self._public(name))
        if written is None:
            return self.version
        guard.model.load_state_dict({**guard.model.state_dict(), **written})
        return model_version(_state(guard, list(self.weights)))

    def _message(self, name: str, number: int, version: str) -> Seen:
        """Let a client train from what it was handed and return its message."""
        client, guard, weight = self.clients[name], self.guards[name], self._weights[name]
        before = self._public(name)
        with guard.round(number, base=version, weight=weight, client=name):
            update = self._sealed(client, guard)
        mask = guard.truth().get("shuffled")
        share = Share(
            name, weight, len(client.images),
            tuple(f"{name} {i}" for i in range(len(client.images))),
            client.images, client.labels,
            mask if mask is not None and len(mask) == len(client.images) else None,
            certain=client.train is None,
            own={**self._kept[name], **update.tensors},  # sealed, and as it left
        )  # fmt: skip
        stack = self._stacks[name]
        return Seen(
            message_name(name, number, share.count), update, before, (share,),
            stack_name(stack) if stack else "", self._normalization, self._loss, number=number,
        )  # fmt: skip

    def _sealed(self, client: LocalClient, guard: Guard) -> Update:
        like = next(guard.model.parameters())
        images = self._normalization.apply(client.images).to(like)
        labels = client.labels.to(like.device)
        if client.train is None:
            return guard.update(images, labels, loss=self._loss, training=self._training)
        names = guard.shared_names()
        before = _state(guard, names)
        guard.will_seal()
        client.train(guard)
        after = _state(guard, names)
        training = client.training
        facts: dict[str, Any] = {"kind": "difference"} if training is None else training.facts()
        made = Update({n: after[n] - before[n] for n in names}, batch_size=len(images), **facts)
        return guard.seal(made, batch=(images, labels))

    def _guard(self, name: str, generator: torch.Generator | None) -> Guard:
        stack: list[Defense] = []
        for defense in self._stacks[name]:
            if defense is sealing_of(self._stacks[name]):
                stack.append(Remembered(self._kept[name]))
                defense = self._scheme.with_keys(name, defense)
            stack.append(defense)
        draws = None
        if generator is not None:
            seed = int(torch.randint(2**62, (), generator=generator))
            draws = torch.Generator().manual_seed(seed)
        return protect(copy.deepcopy(self.model).train(), stack, generator=draws)

    def _public(self, name: str) -> Guard:
        """Return a guard of the model as it stands, without keys."""
        guard = Guard.of(copy.deepcopy(self.guards[name].model))
        sealing = sealing_of(self._stacks[name])
        known = [d for d in guard.defenses if not isinstance(d, Remembered)]
        protection = Protection.of(guard.model)
        assert protection is not None
        protection.defenses = tuple(sealing if sealing_of([d]) and sealing else d for d in known)
        return guard

    def _scheme_of(self, stack: Sequence[Defense], bound: float | Mapping[str, float]) -> Scheme:
        sealing = sealing_of(stack)
        if sealing is None:
            return Plain()
        rehearsal = protect(copy.deepcopy(self.model), stack, generator=torch.Generator())
        heaviest = max(self._weights.values())
        manifest = Manifest.of(rehearsal.encrypted(), bounds=bound, max_weight=heaviest)
        if isinstance(sealing, EncryptedGradients):
            return Encrypted(sealing.preset, manifest, len(self.clients))
        return Masked(manifest, self.clients)


def _state(guard: Guard, names: Sequence[str]) -> dict[str, Tensor]:
    state = {canonical_name(k): t for k, t in guard.model.state_dict().items()}
    return {n: state[n].detach().clone() for n in names}


def _check_plain(update: Update) -> None:
    for name, tensor in update.tensors.items():
        if not bool(tensor.isfinite().all()):
            raise Rejected("array", f"{name} with values that are not finite", "finite values")
