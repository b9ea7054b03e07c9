"""Does an inspection tell crafted weights from honest ones, and what does it cost?

    OMP_NUM_THREADS=1 python benchmarks/inspection.py honest [--out honest.jsonl]
    OMP_NUM_THREADS=1 python benchmarks/inspection.py limits --from honest.jsonl

`honest` inspects every honest checkpoint (inspecting/honest.py) and writes the numbers of its signs.
`limits` proposes limits from the runs with even numbers, and prints the false alarms of the limits
that stand in the package among the others.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

from inspecting.honest import checkpoints

from vitguard.inspection import SIGNS, inspect_model
from vitguard.vit import Anatomy


def honest(out: Path) -> None:
    """Write a line for each honest checkpoint."""
    with out.open("w") as file:
        for number, c in enumerate(checkpoints()):
            c.model.train()
            anatomy = Anatomy.of(c.model)
            found = inspect_model(c.model, anatomy, c.images, c.labels, c.memory)
            line = {
                "kind": c.kind, "run": c.run, "batch": len(c.images), "score": found.score,
                "signs": {s.name: s.value for s in found.signs},
                "where": {s.name: s.where for s in found.signs},
            }  # fmt: skip
            file.write(json.dumps(line) + "\n")
            file.flush()
            if number % 50 == 0:
                print(number, c.kind, f"{found.score:.2f}", flush=True)


def limits(lines: list[dict]) -> None:
    """Print for each sign what honest models have, in both halves."""
    largest: dict[str, dict[int, float]] = defaultdict(lambda: {0: 0.0, 1: 0.0})
    where = {}
    for line in lines:
        for name, value in line["signs"].items():
            if value >= largest[name][line["run"] % 2]:
                largest[name][line["run"] % 2] = value
                where[name, line["run"] % 2] = line["kind"], line["where"][name], line["batch"]
    for name, (limit, _) in SIGNS.items():
        even, odd = largest[name][0], largest[name][1]
        print(f"{name:22} limit {limit:10.4g}  even {even:10.4g} {where.get((name, 0))}")
        print(f"{'':22}       {'':10}   odd {odd:10.4g} {where.get((name, 1))}")
    judged = [line for line in lines if line["run"] % 2]
    alarms = [
        (line["kind"], n, v)
        for line in judged
        for n, v in line["signs"].items()
        if v > SIGNS[n][0]
    ]  # fmt: skip
    wrong = sum(any(v > SIGNS[n][0] for n, v in line["signs"].items()) for line in judged)
    print(f"{len(lines)} honest checkpoints; {wrong} of the {len(judged)} judged are suspicious")
    print(alarms[:20])


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["honest", "limits"])
    parser.add_argument("--out", type=Path, default=Path("honest.jsonl"))
    parser.add_argument("--from", dest="given", type=Path, default=Path("honest.jsonl"))
    options = parser.parse_args()
    if options.what == "honest":
        honest(options.out)
    else:
        limits([json.loads(line) for line in options.given.read_text().splitlines()])


if __name__ == "__main__":
    sys.exit(main())
