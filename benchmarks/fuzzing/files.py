"""Saved updates and checkpoints, compared with a reader that shares nothing with ours."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as safetensors_bytes

from fuzzing.mutations import Chance, Fault, changed_safetensors, plainly
from vitguard.core import Update
from vitguard.errors import VitguardError
from vitguard.models import AprilViT, load_checkpoint

__all__ = ["Checkpoints", "Updates"]


class Updates:
    """Saved updates."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "update"
        tensors = {"a.b": torch.randn(3, 2), "c": torch.randn(5, dtype=torch.float64)}
        self.honest = Update(
            tensors, "difference", 3, 2, 0.1, "sgd", 0.5, 0.01, {"s": "encrypted"}, {"p": b"\0\1"}
        )
        self.honest.save(self.path)
        self.data = self.path.read_bytes()

    def tried(self, chance: Chance) -> str:
        """Load a changed update; whatever is accepted can be saved and is what the file says."""
        data = changed_safetensors(chance, self.data)
        self.path.write_bytes(data)
        try:
            loaded = Update.load(self.path)
        except VitguardError:
            return "refused"
        held = {f"tensor:{k}": v for k, v in loaded.tensors.items()}
        held |= {f"payload:{k}": torch.tensor(list(v)).byte() for k, v in loaded.payloads.items()}
        same_values(held, plainly(data))
        loaded.save(self.path)
        again = Update.load(self.path)
        if self.content(again) != self.content(loaded):
            raise Fault("an update that changes when it is saved")
        return "same" if self.content(loaded) == self.content(self.honest) else "other"

    @staticmethod
    def content(update: Update) -> tuple[Any, ...]:
        """All that an update holds."""
        tensors = {
            k: (str(v.dtype), tuple(v.shape), v.reshape(-1).view(torch.uint8).tolist())
            for k, v in update.tensors.items()
        }
        return (
            tensors, dict(update.sealed), dict(update.payloads), update.kind, update.batch_size,
            update.local_steps, update.learning_rate, update.optimizer, update.momentum,
            update.weight_decay,
        )  # fmt: skip

    def close(self) -> None:
        """Nothing is left to check."""


def same_values(held: dict[str, torch.Tensor], read: dict[str, np.ndarray]) -> None:
    """Compare tensors with what the independent reader saw, bit for bit."""
    if held.keys() != read.keys():
        raise Fault("other names than the file has")
    for name, tensor in held.items():
        mine = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        if mine != read[name].tobytes() or tuple(tensor.shape) != read[name].shape:
            raise Fault(f"{name} with other values than the file has")


class Checkpoints:
    """Checkpoints of a small model, as safetensors and as torch files."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.model = AprilViT(4, 2, 4, 1, 1, 2)
        self.state = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.plain, self.torch = folder / "w.safetensors", folder / "w.pt"
        self.data = safetensors_bytes(self.state)
        buffer = io.BytesIO()
        torch.save(self.state, buffer)
        self.archive = buffer.getvalue()
        with zipfile.ZipFile(buffer) as archive:
            self.members = {m: archive.read(m) for m in archive.namelist()}
        buffer = io.BytesIO()
        torch.save(self.state, buffer, _use_new_zipfile_serialization=False)
        self.legacy = buffer.getvalue()

    def loaded(self, path: Path) -> bool:
        """Load into the model; refused, it is unchanged."""
        self.model.load_state_dict(self.state)
        try:
            load_checkpoint(self.model, path)
        except VitguardError:
            if not self.is_honest():
                raise Fault("a refused checkpoint changed the model") from None
            return False
        if not all(bool(v.isfinite().all()) for v in self.model.state_dict().values()):
            raise Fault("weights that are not finite were loaded")
        return True

    def is_honest(self) -> bool:
        """Whether the model has the honest weights."""
        return all(torch.equal(v, self.state[k]) for k, v in self.model.state_dict().items())

    def safetensors(self, chance: Chance) -> str:
        """A changed safetensors checkpoint."""
        data = changed_safetensors(chance, self.data)
        self.plain.write_bytes(data)
        if not self.loaded(self.plain):
            return "refused"
        if self.is_honest():
            return "same"
        read = {k: torch.from_numpy(v.copy()) for k, v in plainly(data).items()}
        for name, tensor in self.model.state_dict().items():
            kind = "BF16" if read[name].dtype == torch.uint16 else ""
            seen = read[name].view(torch.bfloat16) if kind else read[name]
            if not torch.equal(seen.to(tensor.dtype), tensor):
                raise Fault(f"{name} with other values than the file has")
        return "other"

    def torch_file(self, chance: Chance) -> str:
        """A changed torch checkpoint: its bytes, its members, its tensors, or compressed."""
        kind = chance.random()
        if kind < 0.2:
            data = chance.flip(self.archive, [self.archive, self.legacy])
        elif kind < 0.35:
            data = chance.flip(self.legacy, [self.archive, self.legacy])
        elif kind < 0.75:
            data = self.rewritten(chance)
        else:
            data = self.other_tensors(chance)
        self.torch.write_bytes(data)
        if not self.loaded(self.torch):
            return "refused"
        return "same" if self.is_honest() else "other"

    def rewritten(self, chance: Chance) -> bytes:
        """The archive with a changed, dropped, doubled, renamed or compressed member."""
        members = dict(self.members)
        name = chance.choice((*members, next(iter(members))))
        kind = chance.randrange(6)
        method = zipfile.ZIP_DEFLATED if kind == 0 else zipfile.ZIP_STORED
        if kind == 0 and chance.random() < 0.3:
            members[name] = bytes(chance.choice((10**5, 10**7)))
        elif kind == 1:
            del members[name]
        elif kind == 2:
            members[name + "x"] = members.pop(name)
        elif kind >= 3 and members[name]:
            members[name] = chance.flip(members[name], [members[name]])
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", method) as archive:
            for member, content in members.items():
                archive.writestr(member, content)
        return out.getvalue()

    def other_tensors(self, chance: Chance) -> bytes:
        """A well-formed file with a tensor of another kind."""
        state: dict[Any, Any] = dict(self.state)
        name = chance.choice(list(state))
        tensor = state[name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kinds: list[Callable[[], Any]] = [
                lambda: tensor.to("meta"), lambda: tensor.to_sparse(),
                lambda: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
                lambda: tensor.to(torch.float8_e4m3fn), lambda: tensor.to(torch.float8_e5m2),
                lambda: tensor.to(torch.complex64), lambda: tensor.long(), lambda: tensor.bool(),
                lambda: tensor.double() * 1e300, lambda: tensor.half(), lambda: tensor.bfloat16(),
                lambda: tensor.double(), lambda: tensor * float("nan"), lambda: tensor[None],
                lambda: torch.zeros(1).expand(2**40), lambda: torch.zeros(1).expand(tensor.shape),
                lambda: None, lambda: "text", lambda: [tensor], lambda: {"a": tensor},
                lambda: torch.nn.Parameter(tensor), lambda: tensor.flip(0),
            ]  # fmt: skip
            state[name] = chance.choice(kinds)()
            if chance.random() < 0.1:
                state[chance.choice(("module." + name, 7, None, "x", ("a", 1)))] = tensor
            out = io.BytesIO()
            torch.save(chance.choice((state, state, {"model": state})), out)
        return out.getvalue()

    def close(self) -> None:
        """Nothing is left to check."""
