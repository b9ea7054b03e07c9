"""Fail where a lower bound of pyproject.toml is not what is installed: nothing has tested it."""

import re
import sys
import tomllib
from importlib.metadata import version

from packaging.version import Version

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
(everything,) = extras["all"]
chosen = re.search(r"\[(.*)\]", everything)
assert chosen, everything
apart = {"nvflare"}  # its bound is its newest release, which is tested with the newest of all
names = [name for name in chosen[1].split(",") if name not in apart]
lines = project["dependencies"] + [d for name in names for d in extras[name]]
wrong = []
for line in lines:
    found = re.fullmatch(r"([\w-]+)>=([\d.]+)", line)
    assert found, line
    name, bound = found.groups()
    if Version(Version(version(name)).public) != Version(bound):
        wrong.append(f"{line}, but {version(name)} is installed")
if wrong:
    sys.exit("Lower bounds that no test has seen, raise them:\n  " + "\n  ".join(wrong))
