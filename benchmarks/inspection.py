"""Does an inspection tell crafted weights from honest ones, and what does it cost?

    OMP_NUM_THREADS=1 python benchmarks/inspection.py honest --half 1 --out judged.jsonl
    OMP_NUM_THREADS=1 python benchmarks/inspection.py alarms --from judged.jsonl

`honest` inspects honest checkpoints (inspecting/honest.py): those of half 0, on which the limits
were chosen, or those of half 1. `alarms` prints the false alarms among them, and the largest value
of each sign.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
from pathlib import Path

from inspecting.honest import checkpoints

from vitguard.inspection import SIGNS, inspect_model
from vitguard.vit import Anatomy


def honest(out: Path, half: int) -> None:
    """Write a line for each honest checkpoint."""
    with out.open("w") as file:
        for number, c in enumerate(checkpoints(half)):
            c.model.train()
            anatomy = Anatomy.of(c.model)
            found = inspect_model(c.model, anatomy, c.images, c.labels, c.memory)
            line = {
                "kind": c.kind, "run": c.run, "batch": len(c.images), "score": found.score,
                "signs": {s.name: s.value for s in found.signs},
            }  # fmt: skip
            file.write(json.dumps(line) + "\n")
            file.flush()
            if number % 50 == 0:
                print(number, c.kind, f"{found.score:.2f}", flush=True)


def alarms(lines: list[dict]) -> None:
    """Print the largest value of each sign, and which checkpoints are beyond a limit."""
    for name, (limit, _) in SIGNS.items():
        having = [line for line in lines if name in line["signs"]]
        if not having:
            continue
        worst = max(having, key=lambda line: line["signs"][name])
        where = f"{worst['kind']}, batch of {worst['batch']}"
        print(f"{name:20} limit {limit:10.4g}  largest {worst['signs'][name]:10.4g}  {where}")
    wrong = [line for line in lines if any(v > SIGNS[n][0] for n, v in line["signs"].items())]
    kinds = collections.Counter(line["kind"].split(" vit")[0] for line in lines)
    print(f"{len(lines)} honest checkpoints ({kinds}): {len(wrong)} false alarms")
    for line in wrong:
        beyond = {n: v for n, v in line["signs"].items() if v > SIGNS[n][0]}
        print(f"  {line['kind']}, run {line['run']}, batch of {line['batch']}: {beyond}")


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["honest", "alarms"])
    parser.add_argument("--half", type=int, choices=[0, 1], default=1)
    parser.add_argument("--out", type=Path, default=Path("honest.jsonl"))
    parser.add_argument("--from", dest="given", type=Path, default=Path("honest.jsonl"))
    options = parser.parse_args()
    if options.what == "honest":
        honest(options.out, options.half)
    else:
        alarms([json.loads(line) for line in options.given.read_text().splitlines()])


if __name__ == "__main__":
    sys.exit(main())
