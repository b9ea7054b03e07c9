"""What a client keeps between rounds, and what is typed: states, progress, command lines."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fuzzing.mutations import Chance, Fault
from vitguard.cli.main import main
from vitguard.defenses.encryption import Manifest, SigningKey
from vitguard.defenses.masking import Terms
from vitguard.defenses.privacy import ClientPrivacy
from vitguard.errors import InputError, VitguardError
from vitguard.files import parsed_json
from vitguard.guard import protect
from vitguard.inspection.memory import Memory
from vitguard.models import AprilViT
from vitguard.rounds import Progress

__all__ = ["CommandLines", "States", "Stored"]


class States:
    """Progress files and the state of a guard: a ledger, and the draws of a generator."""

    def __init__(self, folder: Path) -> None:
        self.progress = Progress(7, "a base")
        self.model = AprilViT(4, 2, 4, 1, 1, 2)
        guard = self.guard()
        for _ in range(3):
            guard._ledgers["client-privacy"].record(1.0, 1.0)
        self.state = guard.state_bytes()

    def guard(self):
        """A guard that has spent nothing."""
        model = AprilViT(4, 2, 4, 1, 1, 2)
        stack = [ClientPrivacy(noise=1.0)]
        return protect(model, stack, generator=torch.Generator().manual_seed(0))

    def changed(self, chance: Chance, text: str) -> bytes:
        """Change the JSON, or the bytes."""
        if chance.random() < 0.8:
            return chance.json(json.loads(text)).encode("utf-8", "surrogatepass")
        return chance.flip(text.encode(), [text.encode()])

    def kept(self, chance: Chance) -> str:
        """Read a changed progress; what is accepted is what it says, and saves as the same."""
        data = self.changed(chance, self.progress.to_json())
        try:
            read = Progress.from_json(data)
        except VitguardError:
            return "refused"
        if Progress.from_json(read.to_json()) != read or json.loads(data) != vars(read):
            raise Fault("a progress that changes when it is read")
        return "same" if read == self.progress else "other"

    def spent(self, chance: Chance) -> str:
        """Load a changed state into a guard that has spent one release: it never forgets it."""
        guard = self.guard()
        guard._ledgers["client-privacy"].record(2.0, 1.0)
        data = self.changed(chance, self.state.decode())
        try:
            guard.load_state_bytes(data)
        except VitguardError:
            if guard.privacy_spent().steps != 1:
                raise Fault("a refused state changed the ledger") from None
            return "refused"
        history = guard._ledgers["client-privacy"].history
        if not any((noise, rate) == (2.0, 1.0) for noise, rate, _ in history):  # or more of them
            raise Fault("a state took a release back")
        return "same" if sum(n for *_, n in history) == 4 else "other"

    def close(self) -> None:
        """Nothing is left to check."""


class Stored:
    """JSON that a run keeps between rounds: terms of masks, ledgers of nodes, what is inspected."""

    def __init__(self, folder: Path) -> None:
        signing = SigningKey.generate()
        manifest = Manifest.of({"w": torch.zeros(4)}, bounds=1.0)
        keys = {c: SigningKey.generate().public_bytes() for c in "abc"}
        terms = Terms(manifest, keys, signing.public_bytes())
        memory = Memory()
        memory.accept({"p": torch.ones(8, 8)})
        self.kinds: list[tuple[str, Callable[[bytes], Any], Callable[[Any], str]]] = [
            (terms.to_json(), Terms.from_json, Terms.to_json),
            (json.dumps(memory.state_dict()), remembered, told),
        ]
        if find_spec("flwr"):
            from vitguard.federated.flower.ledgers import Ledgers

            ledgers = Ledgers({"a": 3, "b": 1}, {11: "a", 12: "b"}, ["b"])
            self.kinds.append((ledgers.to_json(), Ledgers.from_json, Ledgers.to_json))
        if find_spec("nvflare"):
            from vitguard.federated.nvflare.state import ServerState

            file = folder / "server.json"
            state = ServerState("a run", "a base", [1, 2])

            def read(data: bytes) -> ServerState:
                file.unlink(missing_ok=True)
                file.touch(0o600)
                file.write_bytes(data)
                found = ServerState.read(file, "a run")
                assert found is not None
                return found

            self.kinds.append((json.dumps(asdict(state)), read, lambda s: json.dumps(asdict(s))))

    def tried(self, chance: Chance) -> str:
        """Read a changed state; what is accepted is what it says."""
        text, read, written = chance.choice(self.kinds)
        data = chance.json(json.loads(text)).encode("utf-8", "surrogatepass")
        if chance.random() < 0.2:
            data = chance.flip(text.encode(), [text.encode()])
        try:
            found = read(data)
        except VitguardError:
            return "refused"
        again, said = json.loads(written(found)), json.loads(data)
        if plain(again) != plain(said):
            raise Fault(f"a state that changes when it is read: {said} as {again}"[:200])
        return "same" if again == json.loads(text) else "other"

    def close(self) -> None:
        """Nothing is left to check."""


def plain(thing: Any) -> Any:
    """Return JSON without what carries no value: case of hexadecimals, float64, nested lists."""
    if isinstance(thing, dict):
        return {name: plain(value) for name, value in thing.items()}
    if isinstance(thing, list):
        parts = [plain(value) for value in thing]
        return [leaf for part in parts for leaf in (part if isinstance(part, list) else [part])]
    if isinstance(thing, str):
        return thing.lower()
    return float(np.float32(thing)) if isinstance(thing, float) else thing


def remembered(data: bytes) -> Memory:
    """Read the memory of an inspection as an NVFlare site does."""
    memory = Memory()
    try:
        memory.load_state_dict(parsed_json(data))
    except ValueError as error:
        if isinstance(error, VitguardError):
            raise
        raise InputError(str(error)) from error
    return memory


def told(memory: Memory) -> str:
    """Return a memory as JSON."""
    return json.dumps(memory.state_dict())


class CommandLines:
    """Command lines that name images which are not there: whatever else they say, exit code 2."""

    def __init__(self, folder: Path) -> None:
        self.missing = str(folder / "no such folder")

    def tried(self, chance: Chance) -> str:
        """Change arguments of an audit or a plan; the error is one line, and no traceback."""
        arguments = [
            "audit", "--model", "april_vit:img_size=8,patch_size=4,embed_dim=8,depth=1,num_heads=2",
            "--defense", "positions:kind=frozen+shuffle:ratio=0.5", "--attack", "span", "position",
            "--withhold", "head", "--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5",
            "--batch-size", "1", "--num-images", "1", "--lr", "0.1", "--images", self.missing,
        ]  # fmt: skip
        for _ in range(chance.choice((0, 1, 1, 1, 2, 3))):
            at = chance.randrange(1, len(arguments))
            if arguments[at] in (self.missing, "--images"):
                continue
            if at == 2:  # a number in it would ask for gigabytes
                words = arguments[at].split(",")
                words[chance.randrange(len(words))] = chance.choice(("", "x", "depth=", "=1", ":"))
                arguments[at] = ",".join(words)
                continue
            arguments[at] = self.word(chance, arguments[at])
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            try:
                code = main(arguments)
            except SystemExit as ended:
                code = ended.code
        if code == 0 and "usage:" in said.getvalue():  # --help, or --version
            return "other"
        if code != 2 or "Traceback" in said.getvalue():
            raise Fault(f"exit code {code} for {arguments}")
        (*_, last) = said.getvalue().strip().splitlines() or [""]
        if not last.startswith("vitguard: error: "):
            raise Fault(f"an error that is no line of ours: {last[:80]}")
        return "same" if self.missing in last else "refused"

    @staticmethod
    def word(chance: Chance, word: str) -> str:
        """Change a word: cut, doubled, a letter of it, or another one."""
        kind, at = chance.randrange(5), chance.randrange(len(word) or 1)
        if kind == 0:
            return word[:at]
        if kind == 1:
            return word[:at] + chance.choice(":=,+/.-\0\n é\ud800'\"{}[]%x9") + word[at:]
        if kind == 2:
            return word[:at] + word[at + 1 :]
        if kind == 3:
            return word + word[at:]
        odd = ("nan", "inf", "-1", "0", "1e400", "", "None", "--", "-h", "all", "none", "9" * 400)
        return chance.choice((*odd, "noise:scale=nan", "ladder:seconds=-1", "shuffle:ratio=2"))

    def close(self) -> None:
        """Nothing is left to check."""
