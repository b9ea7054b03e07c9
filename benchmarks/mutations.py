"""Break the package on purpose in many small ways: each breakage must fail the test named for it.

    python benchmarks/mutations.py                  # all, in about ten minutes of two cores
    python benchmarks/mutations.py mask ledger      # those whose name or file has one of the words
    python benchmarks/mutations.py --docs docs      # writes the table of docs/mutations.md as well;
                                                    # with words, the lines of those that it runs

The breakages stand in mutations.toml. Each one is a replacement of text in a copy of the package;
the copy's own test is run on it, in a process that starts with torch loaded. It ends as

    caught     the test failed
    SURVIVED   the test passed: it does not hold what it says
    ERROR      the pattern no longer stands once in its file, the test fails, is skipped or missing
               without the breakage, or it did not fail but broke or hung

Anything but `caught` ends the program with status 1.
"""

from __future__ import annotations

import argparse
import ast
import collections
import concurrent.futures
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vitguard.testing.guarantees import Guarantee

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).with_suffix(".toml")
COPIED = ("vitguard", "tests", "docs", "benchmarks", "examples", "pyproject.toml", "README.md")
LOADED = ["torch", "timm", "opacus", "tenseal", "hypothesis", "pytest", "skimage", "scipy.stats"]
_LIMIT = 600  # seconds after which a process is called hung
_QUIET = "HYPOTHESIS_NO_PLUGINS"  # set while modules are loaded before the copy is there


@dataclass(frozen=True)
class Mutation:
    """One breakage.

    Args:
        name: What is broken, in words.
        file, old, new: Text that stands once in a file of the package, and what takes its place.
        test: The test that must fail, by its path and name inside tests/.
        also: Further replacements (file, old, new) that make one breakage with it.
        guarantees: Lines of *Guarantees* that it breaks: the class, a colon, how the line begins.
        needs: A package without which neither the code nor the test runs.
    """

    name: str
    file: str
    old: str
    new: str
    test: str
    also: tuple[tuple[str, str, str], ...] = field(default=())
    guarantees: tuple[str, ...] = ()
    needs: str = ""

    @property
    def shown(self) -> str:
        """The test without the folders it is in."""
        return self.test.rpartition("/")[2]

    @staticmethod
    def all() -> list[Mutation]:
        """Read the table."""
        found = tomllib.loads(TABLE.read_text())["mutation"]
        return [
            Mutation(**{
                **m,
                "also": tuple(map(tuple, m.get("also", ()))),
                "guarantees": tuple(m.get("guarantees", ())),
            })
            for m in found
        ]  # fmt: skip

    def misfits(self, package: Path) -> str:
        """Return why the replacements cannot be made, "" where they can."""
        for file, old, new in ((self.file, self.old, self.new), *self.also):
            count = (package / file).read_text().count(old) if (package / file).is_file() else 0
            if count != 1 or old == new:
                return f"{file} has {count} of: {old.strip()[:80]}"
        return ""

    def apply(self, package: Path) -> None:
        """Replace the text in a copy of the package."""
        for file, old, new in ((self.file, self.old, self.new), *self.also):
            path = package / file
            text = path.read_text()
            path.unlink()  # what stood there is a link to the file of the tree
            path.write_text(text.replace(old, new))


def run_tests(folder: Path, tests: list[str], output: str) -> None:
    """Run tests of a copied tree in this process, and end it with pytest's status."""
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    os.environ.pop(_QUIET)
    sys.dont_write_bytecode = False  # the first run compiles the tree for all the others
    sys.path.insert(0, str(folder))
    import hypothesis
    import pytest

    import vitguard
    from vitguard.testing.hypothesis_types import register

    register()  # as Hypothesis's entry point does, which would have loaded the package elsewhere
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)  # that it fails is enough
    hypothesis.settings.register_profile(
        "breakages", deadline=None, database=None, derandomize=True, phases=phases
    )
    assert Path(vitguard.__file__).is_relative_to(folder), vitguard.__file__
    paths = [f"tests/{test}" for test in tests]
    options = ["-v", "--tb=line", "-m", "", "-p", "no:cacheprovider", "-p", "no:xdist", "-rfE"]
    options.append("--hypothesis-profile=breakages")
    if len(tests) == 1:
        options.append("-x")  # of a broken tree: one failure is enough
    status = pytest.main([*options, *paths])
    sys.stdout.flush()
    os._exit(int(status))


def ran(folder: Path, tests: list[str]) -> tuple[int | None, str]:
    """Run tests of a copied tree in a process of its own; return its status and what it printed."""
    context = multiprocessing.get_context("forkserver")
    with tempfile.NamedTemporaryFile("r") as output:
        process = context.Process(target=run_tests, args=(folder, tests, output.name))
        process.start()
        process.join(_LIMIT * max(1, len(tests) // 10))
        if process.is_alive():
            process.kill()
            process.join()
        return process.exitcode, Path(output.name).read_text()


def tried(mutation: Mutation, tree: Path) -> tuple[str, str]:
    """Return how a mutation ended, and a line that says why."""
    if why := mutation.misfits(tree / "vitguard"):
        return "ERROR", why
    with tempfile.TemporaryDirectory(prefix="mutation-") as made:
        folder = Path(made) / "tree"
        shutil.copytree(tree, folder, copy_function=os.link)  # nothing writes into a file there
        mutation.apply(folder / "vitguard")
        status, said = ran(folder, [mutation.test])
    last = (said.strip().splitlines() or [""])[-1]
    if status == 1 and re.search(r"\d+ failed", last):
        failed = re.findall(r"^FAILED \S+?::(.*)$", said, re.M)
        return "caught", "; ".join(failed)[:300]
    return ("SURVIVED" if status == 0 else "ERROR"), f"status {status}: {last}"


def without(tree: Path, mutations: list[Mutation], jobs: int) -> dict[str, str]:
    """Run every named test on the tree as it is; return what is wrong with some, by test."""
    tests = sorted({m.test for m in mutations})
    share = -(-len(tests) // jobs)
    parts = [tests[at : at + share] for at in range(0, len(tests), share)]
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        ends = list(pool.map(lambda part: ran(tree, part), parts))
    status, said = ", ".join({str(end) for end, _ in ends}), "".join(said for _, said in ends)
    ended = re.findall(r"^tests/(\S+?)(\[.*\])? (PASSED|FAILED|ERROR|SKIPPED|XFAIL)", said, re.M)
    bad = {}
    for test in tests:
        found = {how for name, case, how in ended if test in (name, f"{name}{case}")}
        if found != {"PASSED"}:
            how = ", ".join(sorted(found)) or f"not run, status {status}"
            bad[test] = f"without the breakage: {how}"
    return bad


def stamps(tree: Path) -> dict[Path, tuple[int, int]]:
    """Return time and size of every source file, by path; copies are links to these files."""
    return {
        p: (p.stat().st_mtime_ns, p.stat().st_size)
        for p in tree.rglob("*")
        if p.is_file() and p.suffix != ".pyc"
    }


def promised() -> list[Guarantee]:
    """Return the guarantees of every class in the package, by file, whatever is installed.

    A class whose name another one has too is named with its file.
    """
    from vitguard.testing.guarantees import guarantees_in  # of this tree; tests run on copies

    classes = [
        (path.stem, node)
        for path in sorted((ROOT / "vitguard").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and "Guarantees:" in (ast.get_docstring(node) or "")
    ]
    names = collections.Counter(node.name for _, node in classes)
    return [
        guarantee
        for file, node in classes
        for guarantee in guarantees_in(
            ast.get_docstring(node) or "",
            node.name if names[node.name] == 1 else f"{file}.{node.name}",
        )
    ]


def row(mutation: Mutation, ended: str) -> str:
    """Return a line of the table of docs/mutations.md."""
    caught = f"`{mutation.shown}`" + ("" if ended == "caught" else f" **{ended}**")
    return f"| {mutation.name} | `{mutation.file}` | {caught} |"


def mutations_table(ended: dict[str, str], page: str) -> str:
    """Return the table of docs/mutations.md.

    Args:
        ended: How those ended that were run, by name. The others are as the page says, or not run.
        page: The page as it stands.
    """
    every = {m: "caught" if row(m, "caught") in page else "not run" for m in Mutation.all()}
    every |= {m: ended[m.name] for m in every if m.name in ended}
    caught = sum(how == "caught" for how in every.values())
    lines = [f"{caught} of {len(every)} caught.", ""]
    lines += ["| broken on purpose | in | caught by |", "|---|---|---|"]
    return "\n".join([*lines, *(row(m, how) for m, how in every.items())])


def guarantees_table() -> str:
    """Return the table of docs/guarantees.md."""
    lines = ["| class | guarantee | property | to break it |", "|---|---|---|---|"]
    for guarantee in promised():
        ways = [m for m in Mutation.all() if any(guarantee.begins(w) for w in m.guarantees)]
        tests = "<br>".join(dict.fromkeys(f"`{m.shown}`" for m in ways))
        names = "<br>".join(m.name for m in ways)
        lines.append(f"| `{guarantee.owner}` | {guarantee.words} | {tests} | {names} |")
    return "\n".join(lines)


def write_table(path: Path, text: str) -> None:
    """Put a table between the marks of a page."""
    before, _, rest = path.read_text().partition("<!-- table -->\n")
    after = rest.partition("<!-- end of table -->")[2]
    path.write_text(f"{before}<!-- table -->\n{text}\n<!-- end of table -->{after}")


def main() -> None:
    """Run the mutations and print how each ended."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("words", nargs="*", help="only those whose name or file has one of them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--docs", type=Path, help="write the tables of the pages in this folder")
    parser.add_argument("--pages", type=Path, help="write guarantees.md there, and run nothing")
    options = parser.parse_args()
    if options.pages:
        return write_table(options.pages / "guarantees.md", guarantees_table())
    os.environ |= {"OMP_NUM_THREADS": "1", _QUIET: "1"}
    multiprocessing.get_context("forkserver").set_forkserver_preload(LOADED)
    mutations = [
        m
        for m in Mutation.all()
        if not options.words or any(w in f"{m.name} {m.file} {m.test}" for w in options.words)
    ]
    for mutation in [m for m in mutations if m.needs and not find_spec(m.needs)]:
        print(f"left out, {mutation.needs} is not installed: {mutation.name}")
        mutations.remove(mutation)
    start, ended = time.monotonic(), collections.Counter()
    results: list[tuple[Mutation, str, str]] = []
    with tempfile.TemporaryDirectory(prefix="mutations-") as made:
        tree = Path(made) / "tree"
        tree.mkdir()
        for name in COPIED:
            source, target = ROOT / name, tree / name
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, target)
        before = stamps(tree)
        bad = without(tree, mutations, options.jobs)
        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            for mutation, (outcome, why) in zip(
                mutations, pool.map(lambda m: tried(m, tree), mutations), strict=True
            ):
                if mutation.test in bad:
                    outcome, why = "ERROR", bad[mutation.test]
                results.append((mutation, outcome, why))
                ended[outcome] += 1
                seconds = time.monotonic() - start
                print(f"{seconds:6.0f} s  {outcome:9s} {mutation.name}", flush=True)
                if outcome != "caught":
                    print(f"{'':10s} {mutation.file}, {mutation.test}: {why}", flush=True)
        after = stamps(tree)
        if changed := [p for p, stamp in before.items() if after.get(p) != stamp]:
            raise SystemExit(f"a test wrote into the tree that all copies share: {changed}")
    seconds = time.monotonic() - start
    print(f"{ended['caught']} of {len(results)} caught, {seconds:.0f} s, {options.jobs} at a time")
    if options.docs:
        page = options.docs / "mutations.md"
        how = {m.name: outcome for m, outcome, _ in results}
        write_table(page, mutations_table(how, page.read_text()))
        write_table(options.docs / "guarantees.md", guarantees_table())
    raise SystemExit(ended["caught"] != len(results))


if __name__ == "__main__":
    main()
