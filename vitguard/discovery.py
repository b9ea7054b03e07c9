"""Finding what is installed: the classes of a package and of other packages' entry points."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from importlib.metadata import entry_points
from typing import Any

from vitguard.errors import expected

__all__ = ["discover"]


def discover(package: str, *bases: type) -> dict[str, type[Any]]:
    """Return every class of one of `bases` that has a `name`, by that name, in alphabetical order.

    It is found in a module of `package`, or under the entry point group of the same name, by which
    a third party registers its own.

    Raises:
        InputError: An entry point that is no such class, or has the name of another one.
    """
    found: dict[str, type[Any]] = {}
    root = importlib.import_module(package)
    for info in pkgutil.iter_modules(root.__path__, f"{package}."):
        if info.name.startswith(f"{package}._"):
            continue
        module = importlib.import_module(info.name)
        for value in vars(module).values():
            if inspect.isclass(value) and issubclass(value, bases) and "name" in vars(value):
                found[value.name] = value  # type: ignore[attr-defined]
    for point in entry_points(group=package):
        value = point.load()
        if not (inspect.isclass(value) and issubclass(value, bases)):
            kinds = " or ".join(base.__name__ for base in bases)
            raise expected(f"a class of {kinds} at entry point {point.name}", repr(value))
        name: str = value.name  # type: ignore[attr-defined]
        if found.setdefault(name, value) is not value:
            raise expected(f"a name of its own at entry point {point.name}", repr(name))
    return dict(sorted(found.items()))
