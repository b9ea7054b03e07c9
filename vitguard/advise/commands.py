"""The command that verifies advice: the model, weights, part, batch and stack that it is about."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["ATTACK", "Audited"]

ATTACK = "ladder:seconds=30"
"""What a command attacks with: of four updates (two photos, with and without the stack) 120 nominal
seconds of work, less than five minutes of two cores."""
_YOURS = "YOUR_WEIGHTS"
_SAME = frozenset({"img_size", "num_classes"})
"""Arguments of a timm model with which its published weights still load."""


@dataclass(frozen=True)
class Audited:
    """What an audit must be told so that it audits what the advice is about.

    Args:
        model: Its name with arguments; "" for an object, which is audited from Python.
        weights: `--pretrained`, `--checkpoint FILE`, or nothing for random ones.
        train: What is trained and sent.
    """

    model: str
    weights: tuple[str, ...] = ()
    train: str = "all"

    @staticmethod
    def of(
        network: nn.Module, spec: str, setting: str, train: str, checkpoint: str | None
    ) -> Audited:
        """Return what names the model of a spec, with weights as the setting has them."""
        if checkpoint:
            return Audited(spec, ("--checkpoint", checkpoint), train)
        if setting == "scratch":
            return Audited(spec, (), train)
        given = {part.partition("=")[0] for part in spec.partition(":")[2].split(",") if part}
        published = given <= _SAME and _published(network)
        return Audited(spec, ("--pretrained",) if published else ("--checkpoint", _YOURS), train)

    @property
    def note(self) -> str:
        """What a reader must know of the weights in the commands; "" where nothing."""
        if self.weights == ("--pretrained",):
            return (
                "the commands load timm's weights of that name; for your own put "
                "--checkpoint FILE in place of --pretrained"
            )
        if _YOURS in self.weights:
            return f"put the file of your weights in place of {_YOURS} in the commands"
        return ""

    def command(self, batch: int, stack: str = "", attack: str = ATTACK) -> str:
        """Return the command line, or the call in Python where the model has no name."""
        if not self.model:
            return self._call(batch, stack, attack)
        words = ["vitguard", "audit", "--model", self.model, *self.weights]
        words += ["--train", self.train] if self.train != "all" else []
        words += ["--batch-size", str(batch)] if batch > 1 else []
        words += ["--defense", stack] if stack else []
        return shlex.join([*words, "--attack", attack])

    def _call(self, batch: int, stack: str, attack: str) -> str:
        part = f"train_only(model, {self.train!r})" if self.train != "all" else "model"
        given = {"defenses": stack, "attacks": attack, "batch_size": batch}
        words = "".join(f", {name}={value!r}" for name, value in given.items() if value)
        return f"vitguard.audit({part}, (images, labels){words})"


def _published(network: nn.Module) -> bool:
    """Whether timm names weights for this model."""
    config: Any = getattr(network, "pretrained_cfg", None)
    if not isinstance(config, Mapping):
        return False
    return any(config.get(place) for place in ("hf_hub_id", "url", "file"))
