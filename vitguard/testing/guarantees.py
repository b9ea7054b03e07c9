"""Guarantees as objects: what a docstring promises, line by line, to be tied to tests.

from vitguard.testing import guarantees_of

TESTS = {"MyDefense: The update has a norm of at most": test_norm}

def test_every_guarantee_has_a_test():
    for guarantee in guarantees_of(MyDefense):
        assert any(guarantee.begins(words) for words in TESTS)
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Guarantee", "guarantees_in", "guarantees_of"]


@dataclass(frozen=True)
class Guarantee:
    """One promise of a class.

    Args:
        owner: Name of the class.
        words: What it promises, in one line.
    """

    owner: str
    words: str

    def __str__(self) -> str:
        return f"{self.owner}: {self.words}"

    def begins(self, words: str) -> bool:
        """Whether it is meant by `words`: the class, a colon, and how the promise begins."""
        return len(words) > len(self.owner) + 2 and str(self).startswith(words)


def guarantees_of(thing: type) -> tuple[Guarantee, ...]:
    """Return the guarantees of a class; none where its docstring says `None`."""
    return tuple(guarantees_in(inspect.getdoc(thing) or "", thing.__name__))


def guarantees_in(docstring: str, owner: str) -> Iterator[Guarantee]:
    """Read the *Guarantees* part of a docstring; each one ends with the full stop of a line.

    Args:
        docstring: Without the indentation that all its lines share.
    """
    _, found, rest = docstring.partition("\nGuarantees:\n")
    words: list[str] = []
    for line in rest.splitlines() if found else ():
        if not line.startswith(" "):
            break
        words.append(line.strip())
        if line.endswith("."):
            said, words = " ".join(words), []
            if not said.startswith("None"):
                yield Guarantee(owner, said)
