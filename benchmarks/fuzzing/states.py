"""What a client keeps between rounds, and what is typed: states, progress, command lines."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import torch

from fuzzing.mutations import Chance, Fault
from vitguard.cli.main import main
from vitguard.defenses.privacy import ClientPrivacy
from vitguard.errors import VitguardError
from vitguard.guard import protect
from vitguard.models import AprilViT
from vitguard.rounds import Progress

__all__ = ["CommandLines", "States"]


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
        if (2.0, 1.0, 1) not in history:
            raise Fault("a state took a release back")
        return "same" if sum(n for *_, n in history) == 4 else "other"

    def close(self) -> None:
        """Nothing is left to check."""


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
