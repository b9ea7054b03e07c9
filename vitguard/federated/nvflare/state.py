"""What a party of a run must remember between messages: one file, readable by its owner alone."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from vitguard.defenses.encryption import model_version
from vitguard.errors import InputError, Rejected, Unprotected, expected
from vitguard.files import parsed_json, private_folder, write_atomically
from vitguard.rounds import Progress, first_version

__all__ = [
    "ClientState",
    "ServerState",
    "initial_version",
    "passphrase_of",
    "private_bytes",
    "state_folder",
    "site_of",
]

_KIND = "vitguard"


def state_folder(run: str | Path) -> Path:
    """Return the folder of vitguard in a run directory, mode 700; made where it is not there."""
    return private_folder(Path(run) / "vitguard")


@dataclass
class ClientState:
    """A client between two messages.

    Args:
        run: Digest of the manifest that it belongs to.
        progress: Version of the model that the client holds, and the last round whose sum was
            opened. It is written before the sum is opened: after a crash in between the client
            refuses rather than opens it twice.
        total: SHA-256 of that sum, in hexadecimal, once it is part of the model.
        training: Round that the client trains in, -1 for none.
        guard: What `Guard.state_dict` says of ledgers, as JSON.
        weights: The model.
    """

    run: str
    progress: Progress = field(default_factory=Progress)
    total: str = ""
    training: int = -1
    guard: str = ""
    weights: dict[str, Tensor] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Replace the file by this state, mode 600."""
        named = (f.name for f in fields(self) if f.name not in ("weights", "progress"))
        facts = {n: getattr(self, n) for n in named} | {"progress": self.progress.to_json()}
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in self.weights.items()}
        write_atomically(path, save(whole, {_KIND: json.dumps(facts)}), private=True)

    @staticmethod
    def read(path: Path, run: str) -> ClientState:
        """Return the state in the file; a new one where there is none.

        Raises:
            Rejected: It is of another run, damaged, or others can read it.
        """
        if not path.exists():
            return ClientState(run)
        data = private_bytes(path)
        try:
            size = int.from_bytes(data[:8], "little")
            facts = parsed_json(parsed_json(data[8 : 8 + size])["__metadata__"][_KIND])
            progress = Progress.from_json(facts.pop("progress"))
            _require(facts, {"run": str, "total": str, "training": int, "guard": str})
            state = ClientState(**facts, progress=progress, weights=load(data))
        except (InputError, KeyError, TypeError, ValueError, SafetensorError) as error:
            problem = type(error).__name__
            raise Rejected("state", f"{path} ({problem})", "the state of a client") from error
        _same_run(state.run, run, path)
        return state


@dataclass
class ServerState:
    """The server between two rounds: the version of the model, which it cannot read.

    Args:
        run: Digest of the manifest.
        base: Version of the model that clients hold once they opened the sums so far.
        rounds: Rounds whose sums are kept, in order.
    """

    run: str
    base: str
    rounds: list[int] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Replace the file by this state, mode 600."""
        write_atomically(path, json.dumps(asdict(self)), private=True)

    @staticmethod
    def read(path: Path, run: str) -> ServerState | None:
        """Return the state in the file, or None where there is none.

        Raises:
            Rejected: It is of another run, damaged, or others can read it.
        """
        if not path.exists():
            return None
        try:
            stored = parsed_json(private_bytes(path))
            _require(stored, {"run": str, "base": str, "rounds": list})
            if any(type(number) is not int for number in stored["rounds"]):
                raise TypeError("rounds")
            state = ServerState(**stored)
        except (TypeError, ValueError) as error:
            problem = type(error).__name__
            raise Rejected("state", f"{path} ({problem})", "the state of a server") from error
        _same_run(state.run, run, path)
        return state


def _require(stored: Any, kinds: dict[Any, type]) -> None:
    """Raise TypeError unless it is a dict with these fields, each of its type."""
    if type(stored) is not dict or {n: type(value) for n, value in stored.items()} != kinds:
        raise TypeError("other fields")


def private_bytes(path: Path) -> bytes:
    try:
        if os.name == "posix" and stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise Rejected("state", f"{path}, which others may read", "a state of mode 600")
        return path.read_bytes()
    except OSError as error:
        said = error.strerror or type(error).__name__
        raise Rejected("state", f"{path} ({said})", "a file that can be read") from error


def _same_run(found: Any, run: str, path: Path) -> None:
    if found != run:
        raise Rejected("state", f"that of another run in {path}", "the state of this run")


def initial_version(weights: Mapping[str, Tensor], fl_ctx: Any) -> str:
    """Return the version of the initial model in this job: no message of another job fits it."""
    return first_version(model_version(weights), str(fl_ctx.get_job_id()).encode())


def passphrase_of(variable: str) -> str:
    """Return the passphrase in an environment variable.

    Raises:
        InputError: It is not set.
    """
    phrase = os.environ.get(variable, "")
    if not phrase:
        raise expected(
            f"a passphrase in the environment variable {variable}", "none",
            "Set it where the process starts; never put it into a job's configuration.",
        )  # fmt: skip
    return phrase


def site_of(fl_ctx: Any) -> str:
    """Return the name of this site, which is safe as part of a file name.

    Raises:
        Unprotected: There is none.
    """
    site = fl_ctx.get_identity_name()
    if not isinstance(site, str) or not site or any(c in site for c in "/\\\0") or site[0] == ".":
        raise Unprotected(f"Expected the name of a site, got {str(site)[:80]!r}.")
    return site
