"""Step time of the patch shuffle over the plain step, interleaved in one run.

    python benchmarks/shuffle.py [--model vit_small_patch16_224] [--batch 16] [--rounds 7]

A step is forward, backward and AdamW. Plain and shuffled steps alternate on copies of one model;
each printed ratio is the median over rounds of the two neighbouring times, with its range. On a
machine that others use as well, the ratio of processor seconds says more than that of the clock.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitguard.defenses.shuffle import PatchShuffle
from vitguard.guard import Guard, protect

CASES = {
    "ratio 0.7, block-wise": PatchShuffle(0.7),
    "ratio 0.7, uniform": PatchShuffle(0.7, mask="uniform"),
    "ratio 0.7, DAL over positions": PatchShuffle(0.7, dal="positions"),
    "ratio 0.7, DAL over tokens": PatchShuffle(0.7, dal="tokens"),
}


def main() -> None:
    """Measure every case and print its ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--case", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    print(f"{options.model}, batch {options.batch}, {options.device}, ", end="")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    plain = timm.create_model(options.model).to(options.device).train()
    size = plain.patch_embed.img_size
    images = torch.rand(options.batch, 3, *size, device=options.device)
    labels = torch.arange(options.batch, device=options.device)
    for case in options.case:
        guards = [protect(copy.deepcopy(plain), s) for s in ([], [CASES[case]])]
        steppers = [_Stepper(guard) for guard in guards]
        times = [[s.seconds(images, labels) for s in steppers] for _ in range(options.rounds + 1)]
        for i, clock in enumerate(("clock", "processor")):
            # the first round warms up
            ratios = sorted(shuffled[i] / base[i] for base, shuffled in times[1:])
            base = statistics.median(t[0][i] for t in times[1:])
            print(
                f"{case:32} {clock:9} {statistics.median(ratios):.3f} of a plain step of "
                f"{base:.3f} s ({ratios[0]:.3f} to {ratios[-1]:.3f})"
            )
        print(f"{case:32} draws     {1e3 * _draws(guards[1], images):.1f} ms of the processor")


class _Stepper:
    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.optimizer = torch.optim.AdamW(guard.model.parameters(), lr=1e-4)

    def seconds(self, images: Tensor, labels: Tensor) -> tuple[float, float]:
        _wait(self.guard.model)
        clock, processor = time.perf_counter(), time.process_time()
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.guard.model(images), labels) + self.guard.auxiliary_loss()
        loss.backward()
        self.optimizer.step()
        _wait(self.guard.model)
        return time.perf_counter() - clock, time.process_time() - processor


def _wait(model: nn.Module) -> None:
    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()


def _draws(guard: Guard, images: Tensor) -> float:
    """Return the processor seconds that masks and permutations of one batch take."""
    piece = guard.model.get_submodule("vitguard.shuffle")
    started = time.process_time()
    for _ in range(5):
        piece.draw(len(images), guard.anatomy.grid)  # type: ignore[operator]
    return (time.process_time() - started) / 5


if __name__ == "__main__":
    main()
