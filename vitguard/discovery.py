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
    kinds = " or ".join(base.__name__ for base in bases)
    for point in entry_points(group=package):
        where = f"entry point {point.name} ({point.value})"
        try:
            value = point.load()
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            raise expected(
                f"a module that imports at {where}", why, "Mend or remove it."
            ) from error
        if not (inspect.isclass(value) and issubclass(value, bases)):
            raise expected(f"a class of {kinds} at {where}", repr(value))
        if missing := sorted(getattr(value, "__abstractmethods__", ())):
            raise expected(f"a {kinds} with {', '.join(missing)} at {where}", "none")
        name = getattr(value, "name", None)
        if not (isinstance(name, str) and name):
            raise expected(f"a {kinds} with a name at {where}", repr(name))
        if found.setdefault(name, value) is not value:
            raise expected(f"a name of its own at {where}", repr(name))
    return dict(sorted(found.items()))
