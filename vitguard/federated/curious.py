"""An honest-but-curious server: it keeps what comes in, to attack it afterwards."""

from __future__ import annotations

import contextlib
import copy
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import torch.nn.functional as F
from torch import Tensor, nn

from vitguard.audit.seen import Seen, SeenRound, Share, message_name
from vitguard.core import Loss, Normalization, Update
from vitguard.errors import InputError, expected
from vitguard.files import private_folder, write_atomically
from vitguard.guard import Guard, Stack, protect, stack_of
from vitguard.models import normalization_of
from vitguard.registry import stack_name
from vitguard.tensor_files import read_checkpoint
from vitguard.vit import canonical_name

__all__ = ["Recording", "update_of"]

_ROUND = re.compile(r"round-(\d{1,18})")
_BEFORE, _RUN = "before.safetensors", "run"


def update_of(
    arrived: Mapping[str, Tensor | bytes],
    before: Mapping[str, Tensor],
    *,
    whole: bool = False,
    **facts: Any,
) -> Update:
    """Return what arrived from a client as an update.

    Args:
        arrived: Tensors by name; bytes are ciphertext, and stand for all that is missing.
        before: The weights that the client started from, by name.
        whole: Whether the tensors are weights after training, and not differences.
        facts: What the server knows of the training: `batch_size`, `learning_rate`, ...

    Raises:
        InputError: Weights of another shape, or a fact that is none.
    """
    tensors = {canonical_name(n): t for n, t in arrived.items() if isinstance(t, Tensor)}
    blobs = {n: bytes(b) for n, b in arrived.items() if not isinstance(b, Tensor)}
    start = {canonical_name(n): t for n, t in before.items()}
    if whole:
        if wrong := next((n for n, t in tensors.items() if n not in start), ""):
            raise expected("weights of the model that was sent", wrong)
        if wrong := next((n for n, t in tensors.items() if t.shape != start[n].shape), ""):
            raise expected(f"{wrong} of shape {tuple(start[wrong].shape)}", "another")
        tensors = {n: t - start[n] for n, t in tensors.items() if t.is_floating_point()}
    sealed = {n: "ciphertext" for n in start if n not in tensors} if blobs else {}
    return Update(tensors, kind="difference", sealed=sealed, payloads=blobs, **facts)


@dataclass(frozen=True)
class Recording:
    """A folder with what a server was sent: for each round the weights before it, and updates.

    Args:
        folder: Made where it is not there, with all in it for its owner alone: it holds whatever
            the updates hold.
        run: Name of the run, one line. By default each `Recording` is a run of its own: name it
            where a server that restarts goes on with its folder.

    Raises:
        InputError: A run without a name of one line.
    """

    folder: Path | str
    run: str = field(default_factory=lambda: secrets.token_hex(16))

    def __post_init__(self) -> None:
        if not isinstance(self.run, str) or not re.fullmatch(r"\S(.{0,126}\S)?", self.run):
            raise expected("the name of a run, one line", repr(self.run)[:80])

    def keep(self, number: int, client: str, update: Update, before: Mapping[str, Tensor]) -> None:
        """Write a client's update of a round; weights before it are written once.

        Raises:
            InputError: The files cannot be written, or hold what another run left.
        """
        from safetensors.torch import save

        self._claim()
        place = private_folder(Path(self.folder) / f"round-{number}")
        whole = save({n: t.detach().cpu().clone().contiguous() for n, t in before.items()})
        start = place / _BEFORE
        file = place / f"update-{quote(client, safe='')}.safetensors"
        if file.exists() or (start.exists() and start.read_bytes() != whole):
            raise expected(
                f"one update of {client} in round {number}, from the weights of its round",
                "a second one, or other weights", "Record another run in another folder.",
            )  # fmt: skip
        if not start.exists():
            write_atomically(start, whole, private=True)
        update.save(file)

    def _claim(self) -> None:
        """Make the folder that of this run.

        Raises:
            InputError: It is that of another one.
        """
        name = private_folder(self.folder) / _RUN
        if not name.exists() and not any(Path(self.folder).glob("round-*")):
            with contextlib.suppress(InputError):  # another process was faster
                write_atomically(name, self.run, private=True, overwrite=False)
        found = name.read_text(errors="replace") if name.is_file() else "unknown"
        if found != self.run:
            raise expected(
                f"a folder of the run {self.run!r}", f"{self.folder} of {found[:128]!r}",
                "Record another run in another folder; to go on with one, give its name.",
            )  # fmt: skip

    def rounds(
        self,
        model: nn.Module,
        defenses: Stack = (),
        *,
        images: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        title: str = "",
        normalization: Normalization | None = None,
        loss: Loss = F.cross_entropy,
    ) -> list[SeenRound]:
        """Return the rounds as `vitguard.audit` takes them.

        Args:
            model: The bare model; the weights of each round are loaded into a copy.
            defenses: The stack that the clients ran.
            images: Pixels in [0, 1] and labels behind a client's updates, by its name, to score
                guesses with; without them a guess leaks that reproduces the update.
            title: Put before the names of what was seen, where an audit takes several recordings.

        Raises:
            InputError: The folder holds no round, or files of something else.
        """
        places = sorted(
            (int(found[1]), place)
            for place in Path(self.folder).glob("round-*")
            if (found := _ROUND.fullmatch(place.name))
        )
        if not places:
            raise expected("a folder with recorded rounds", f"none in {self.folder}")
        stack = stack_of(defenses)
        like = Seen(
            title, Update({}), protect(copy.deepcopy(model).train(), stack), (),
            stack_name(stack) if stack else "", normalization or normalization_of(model), loss,
        )  # fmt: skip
        return [_round(like, number, place, images or {}) for number, place in places]


def _round(
    like: Seen, number: int, place: Path, images: Mapping[str, tuple[Tensor, Tensor]]
) -> SeenRound:
    """Return what a folder of one round holds."""
    before = read_checkpoint(place / _BEFORE)
    guard = _loaded(Guard.of(copy.deepcopy(like.guard.model)), before)
    messages = []
    for file in sorted(place.glob("update-*.safetensors")):
        client, update = unquote(file.stem.removeprefix("update-")), Update.load(file)
        told = {canonical_name(n) for n in before}
        if lacking := [n for n in update.tensors if n not in told and n[:9] != "vitguard."]:
            raise expected(f"weights before each tensor of {client}'s update", f"no {lacking[0]}")
        count = update.batch_size
        pixels, labels = images.get(client, (None, None))
        if pixels is not None and len(pixels) != count:
            raise expected(f"{count} images of {client}", len(pixels))
        names = tuple(f"{client} {i}" for i in range(count))
        share = Share(client, 1.0, count, names, pixels, labels, certain=False)
        name = ": ".join(filter(None, (like.name, message_name(client, number, count))))
        messages.append(replace(like, name=name, update=update, guard=guard, shares=(share,)))
    return SeenRound(number, "", "", tuple(messages), weights=before)


def _loaded(guard: Guard, before: Mapping[str, Tensor]) -> Guard:
    own = guard.model.state_dict()
    named = {canonical_name(n): t for n, t in before.items()}
    shapes = {canonical_name(k): t.shape for k, t in own.items() if isinstance(t, Tensor)}
    for name, tensor in named.items():
        if name not in shapes:
            raise expected("weights of the model before each round", f"the unknown {name}")
        if tensor.shape != shapes[name]:
            raise expected(f"{name} of shape {tuple(shapes[name])}", tuple(tensor.shape))
    guard.model.load_state_dict(
        {k: named.get(canonical_name(k), t) if isinstance(t, Tensor) else t for k, t in own.items()}
    )
    return guard
