"""Every training loop with every kind of defense: the weights of a loop by hand, or one clear line.

The matrix is marked slow; some cells of it are not. `tests/loops.py` holds the loops by hand,
docs/training-loops.md the table, which `python -m tests.guard.test_loop_matrix` writes.
"""

import copy
import functools
import io
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.optim._param_groups import param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import vitguard as vg
from tests import loops
from tests.loops import COLUMNS, DECAY, LOOPS, LR, MOMENTUM, SEED, STEPS, Column, Loop, Result
from vitguard.defenses.encryption import (
    Aggregator,
    Decryptor,
    EncryptedGradients,
    Encryptor,
    KeySet,
    Manifest,
    SigningKey,
)
from vitguard.errors import VitguardError

pytest.importorskip("opacus")
PAGE = Path(__file__).parents[2] / "docs" / "training-loops.md"
BUILT = ("before protect", "after protect")
BOUND = 2.0  # of encrypted values, whose steps are then far below 1e-5

SCHEDULERS = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda k: 1 / (k + 1)),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=8),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=2), schedulers.ExponentialLR(o, 0.9)], [2]
    ),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1),
    "timm": lambda o: CosineLRScheduler(o, t_initial=8, warmup_t=2, warmup_lr_init=0.01),
}


# the loops as people write them


class Run:
    """One training run under vitguard: what a script builds, and what a checkpoint holds."""

    def __init__(self, loop: Loop, column: Column, built: str, *, model_seed=0, draw_seed=SEED):
        self.loop, self.column = loop, column
        self.moves = []
        self.model = loops.build(loop.dtype, model_seed)
        if loop.frozen:
            self.model.get_submodule(loop.frozen).requires_grad_(False)
        early = built == "before protect"
        if early:
            self.optimizer, self.scheduler = self._optimizer(self.model)
        self.kinds = set()  # of the head's outputs, which autocast changes
        self.model.head.register_forward_hook(lambda m, a, out: self.kinds.add(out.dtype))
        generator = torch.Generator().manual_seed(draw_seed)
        self.guard = vg.protect(self.model, self._stack(), generator=generator)
        self.guard.will_seal()
        self.extras = self.guard.extras()
        if not early:
            self.optimizer, self.scheduler = self._optimizer(self.model)
        data = DataLoader(TensorDataset(*loops.records(loop.dtype)), batch_size=loops.BATCH)
        self.optimizer, self.loader = self.guard.prepare(self.optimizer, data)
        self.loader = data if self.loader is None else self.loader
        self.average = None
        if loop.ema_kind == "torch":
            average = get_ema_multi_avg_fn(loop.ema)
            self.average = AveragedModel(self.model, multi_avg_fn=average)
        if loop.ema_kind == "timm":
            self.average = ModelEmaV3(self.model, decay=loop.ema)

    def _stack(self):
        if not self.column.encrypted:
            return self.column.spec
        self.signing = SigningKey.generate()
        self.keys = KeySet.generate(preset="precise", server=self.signing.public_bytes())
        bare = copy.deepcopy(self.model)
        planned = vg.protect(bare, EncryptedGradients(preset="precise"))
        self.manifest = Manifest.of(planned.encrypted(), bounds=BOUND)
        self.encryptor = Encryptor(self.keys, self.manifest, client_id="a")
        return [EncryptedGradients(preset="precise", encryptor=self.encryptor)]

    def _optimizer(self, model):
        parameters = model.parameters()
        if self.loop.layer_decay < 1:
            parameters = param_groups_layer_decay(
                model, DECAY, model.no_weight_decay(), layer_decay=self.loop.layer_decay
            )
            for group in parameters:
                group["lr"] = LR * group["lr_scale"]
        optimizer = torch.optim.SGD(parameters, LR, momentum=MOMENTUM, weight_decay=DECAY)
        kind = self.loop.scheduler
        return optimizer, SCHEDULERS[kind](optimizer) if kind else None

    def save(self) -> bytes:
        state = {k: getattr(self, k).state_dict() for k in ("model", "optimizer", "guard")}
        state["scheduler"] = self.scheduler.state_dict() if self.scheduler else {}
        torch.save(state, file := io.BytesIO())
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        state = torch.load(io.BytesIO(saved), weights_only=False)
        for name in ("model", "optimizer", "guard"):
            getattr(self, name).load_state_dict(state[name])
        if self.scheduler:
            self.scheduler.load_state_dict(state["scheduler"])

    def batches(self, skip=0):
        while True:
            for number, batch in enumerate(self.loader):
                if number >= skip:
                    yield batch
            skip = 0

    def loss(self, images, labels):
        total = 0
        for view in range(self.loop.views):
            total = total + F.cross_entropy(self.model(images.flip(-1) if view else images), labels)
            for mask, source in zip(*self.guard.truth().values(), strict=True):
                slots = mask.nonzero()[:, 0].tolist()
                self.moves.append({s: int(source[s]) for s in slots})
            if not self.loop.late:
                total = total + self.guard.auxiliary_loss()
        return total + self.guard.auxiliary_loss() if self.loop.late else total

    def train(self, first: int, last: int) -> None:
        counted = first * self.loop.micro
        poisson = "Poisson" in type(self.loader).__name__  # each of its batches is drawn anew
        batches = self.batches(0 if poisson else counted % loops.BATCHES)
        for k in range(first, last):
            for _ in range(self.loop.micro):
                images, labels = next(batches)
                with torch.autocast("cpu", torch.bfloat16, enabled=self.loop.autocast):
                    loss = self.loss(images, labels)
                (loss / self.loop.micro).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if isinstance(self.scheduler, schedulers.ReduceLROnPlateau):
                self.scheduler.step(1.0)
            elif isinstance(self.scheduler, CosineLRScheduler):
                self.scheduler.step(k + 1)
            elif self.scheduler:
                self.scheduler.step()
            if isinstance(self.average, AveragedModel):
                self.average.update_parameters(self.model)
            elif self.average is not None:
                self.average.update(self.model)

    def weights(self, model=None):
        return {n: t.detach().clone() for n, t in (model or self.model).state_dict().items()}

    def sealed(self, start):
        moved = {n: p.detach() - start[n] for n, p in self.model.named_parameters()}
        update = vg.Update(moved, kind="difference", batch_size=loops.BATCH)
        if self.column.encrypted:
            self.encryptor.start_round(1)
        update = self.guard.seal(update)
        return self._opened(update) if self.column.encrypted else dict(update.tensors)

    def _opened(self, update):
        """The average with another client, who sends zeros, doubled."""
        assert not update.tensors
        zeros = {n: torch.zeros_like(p) for n, p in self.guard.encrypted().items()}
        other = Encryptor(self.keys, self.manifest, client_id="b").encrypt(zeros, round_id=1)
        server = Aggregator(self.keys.for_server(), self.manifest, signing=self.signing, round_id=1)
        for message in (update.payloads["encryption"], other):
            server.add(message)
        opened = Decryptor(self.keys, self.manifest).decrypt(server.finish(), round_id=1)
        return {n: 2 * t for n, t in opened.items()}


def trained(loop: Loop, column: Column, built: str) -> tuple[Result, Run]:
    """Train under vitguard; for the start of what the defense added see `Run.extras`."""
    run = Run(loop, column, built)
    start = run.weights()
    if loop.resume:
        extras, moves = run.extras, run.moves
        run.train(0, loop.resume)
        saved = run.save()
        run = Run(loop, column, built, model_seed=5, draw_seed=99)
        run.load(saved)
        run.extras, run.moves = extras, moves
        run.train(loop.resume, STEPS)
    else:
        run.train(0, STEPS)
    averaged = run.weights(run.average.module) if run.average is not None else {}
    result = Result(run.weights(), start, averaged)
    result.sealed, result.moves = run.sealed(start), run.moves
    ledger = run.guard._ledgers.get("privacy")
    result.spent = ledger.history if ledger is not None else []
    return result, run


# comparing


def distance(got, want, start) -> float:
    """How far two sets of weights are apart, over the way that the second went."""
    assert got.keys() >= want.keys()
    gap = sum(float((got[n].double() - w.double()).square().sum()) for n, w in want.items())
    way = sum(float((w.double() - start[n].double()).square().sum()) for n, w in want.items())
    assert way > 0
    return (gap / way) ** 0.5


def compare(loop: Loop, column: Column, built: str) -> None:
    """Raise AssertionError where the run does not end where the loop by hand ends."""
    got, run = trained(loop, column, built)
    want = loops.reference(loop, column, extras=run.extras)
    assert (torch.bfloat16 in run.kinds) == loop.autocast and run.kinds <= {
        torch.bfloat16, loop.dtype,
    }  # fmt: skip
    assert distance(got.weights, want.weights, want.start) <= loop.tolerance
    assert got.moves == want.moves
    still = [n for n in want.weights if n not in loops.trained_names(want.weights, loop, column)]
    assert all(torch.equal(got.weights[n], got.start[n]) for n in still)
    if loop.ema:
        assert distance(got.averaged, want.averaged, want.start) <= loop.tolerance
        image = loops.records(loop.dtype)[0][:1]
        seen = run.average.module.eval()(image)[0]
        by_hand = loops.logits_of(got.averaged, loops.outputs_of(got.averaged, image[0]))
        assert torch.allclose(seen, by_hand, atol=1e-9)
    assert got.sealed.keys() == want.sealed.keys()
    zero = {n: torch.zeros_like(t) for n, t in want.sealed.items()}
    error = distance(got.sealed, want.sealed, zero)
    assert error <= (1e-3 if column.encrypted else 0) + loop.tolerance
    if column.encrypted:
        assert all(
            (got.sealed[n] - t).abs().max() < 1e-5 + loop.tolerance for n, t in want.sealed.items()
        )
    merged = [(n, r) for n, r, count in got.spent for _ in range(count)]
    assert merged == [(n, r) for n, r, _ in want.spent]


@functools.cache
def refusal(loop: Loop, column: Column, built: str) -> str:
    """Return the line of a refused loop, "" where it trains; nothing may have moved before."""
    run = Run(loop, column, built)
    start = run.weights()
    try:
        run.train(0, 1)
    except VitguardError as error:
        assert all(torch.equal(t, start[n]) for n, t in run.weights().items())
        assert run.guard.state_dict()["ledger"].get("privacy", {}).get("runs", {}) == {}
        return str(error)
    return ""


def table() -> str:
    """The matrix as the docs print it."""
    lines: list[str] = []
    rows = []
    for loop in LOOPS:
        cells = []
        for column in COLUMNS:
            said = refusal(loop, column, BUILT[0])
            if said and said not in lines:
                lines.append(said)
            cells.append(f"refused: line {lines.index(said) + 1}" if said else "works")
        rows.append(" | ".join([loop.name, *cells]))
    head = " | ".join(["Loop", *(column.name for column in COLUMNS)])
    rule = " | ".join(["---"] * (1 + len(COLUMNS)))
    text = "\n".join(f"| {row} |" for row in (head, rule, *rows))
    return text + "\n\n" + "\n".join(f"{i + 1}. {line}" for i, line in enumerate(lines)) + "\n"


# the matrix

FAST = {  # built before protect, as is one of two plain loops
    ("LambdaLR", "privacy"), ("timm's layer decay", "shuffle with DAL"),
    ("resumed mid-epoch", "shuffle with DAL"), ("accumulation over 4 batches", "privacy"),
    ("two forwards, then their losses", "shuffle with DAL"), ("frozen stem", "encryption"),
}  # fmt: skip


def fast(loop, column, built):
    if loop.name == "plain":
        return built == BUILT[COLUMNS.index(column) % 2]
    return (loop.name, column.name) in FAST and built == BUILT[0]


def both(loop, column):
    """Whether the optimizer is built before and after; elsewhere one and the other in turn."""
    return loop.name in ("plain", "resumed mid-epoch")


CELLS = [
    pytest.param(
        loop, column, built, id=f"{loop.name}-{column.name}-{built}",
        marks=() if fast(loop, column, built) else pytest.mark.slow,
    )
    for row, loop in enumerate(LOOPS) for place, column in enumerate(COLUMNS) for built in BUILT
    if both(loop, column) or fast(loop, column, built) or built == BUILT[(row + place) % 2]
]  # fmt: skip


@pytest.mark.parametrize(("loop", "column", "built"), CELLS)
def test_a_loop_ends_at_the_weights_of_the_loop_by_hand_or_is_refused(loop, column, built):
    said = refusal(loop, column, built)
    if not said:
        compare(loop, column, built)
        return
    assert said.startswith("Expected ") and ", got " in said and said.count(". ") >= 1
    assert said in PAGE.read_text()


@pytest.mark.slow
def test_the_table_of_the_docs_is_the_one_that_the_loops_give():
    assert table() in PAGE.read_text()


def test_the_table_of_the_docs_has_every_loop_and_every_defense():
    rows = [r.strip("|").split("|") for r in PAGE.read_text().splitlines() if r.startswith("|")]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert cells[0][1:] == [column.name for column in COLUMNS]
    assert [row[0] for row in cells[2:]] == [loop.name for loop in LOOPS]


# what the comparison sees


def named(loop, column):
    return (
        next(one for one in LOOPS if one.name == loop),
        next(one for one in COLUMNS if one.name == column),
    )


SCHEDULED = [loop.name for loop in LOOPS if loop.scheduler]
FAULTS = [
    ("nothing is clipped", "plain", "privacy"),
    ("nothing is clipped", "bfloat16 autocast", "privacy"),
    ("nothing is clipped", "plain", "all three"),
    ("no noise", "plain", "privacy"),
    ("no noise", "plain", "noise"),
    ("only the last batch counts", "accumulation over 4 batches", "noise"),
    ("only the last batch counts", "accumulation over 4 batches", "shuffle with DAL"),
    *(("the rate stays", name, "noise") for name in SCHEDULED),
    ("all layers at one rate", "timm's layer decay", "positions"),
    ("the stem is trained", "frozen stem", "positions"),
    ("the stem is trained", "frozen stem", "privacy"),
    ("the average follows at once", "torch's AveragedModel", "noise"),
    ("the average follows at once", "timm's ModelEmaV3", "noise"),
    ("the optimizer forgets", "resumed mid-epoch", "encryption"),
    ("one view only", "two forwards in a step", "shuffle with DAL"),
    ("one view only", "two forwards in a step", "positions"),
    ("masked patches keep their positions", "plain", "shuffle with DAL"),
    ("masked patches keep their positions", "bfloat16 autocast", "shuffle with DAL"),
    ("no localization", "plain", "shuffle with DAL"),
    ("no localization", "bfloat16 autocast", "shuffle with DAL"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "loop", "column"), FAULTS)
def test_a_fault_in_a_loop_is_further_away_than_the_tolerance(fault, loop, column):
    loop, column = named(loop, column)
    extras = Run(loop, column, BUILT[0]).extras
    right, wrong = (loops.reference(loop, column, extras=extras, fault=f) for f in ("", fault))
    apart = distance(wrong.weights, right.weights, right.start)
    if loop.ema:
        apart = distance(wrong.averaged, right.averaged, right.start)
    if column.scale and fault == "no noise":
        zero = {n: torch.zeros_like(t) for n, t in right.sealed.items()}
        apart = distance(wrong.sealed, right.sealed, zero)
    assert apart > 2 * loop.tolerance


def unclipped(tape, clip, **settings):
    from vitguard.defenses.privacy.engine import clipped_sum

    return clipped_sum(tape, 1e9, **settings)


BREAKS = {
    "no clipping": ("vitguard.defenses.privacy.optimizer.clipped_sum", unclipped, "privacy"),
    "no noise in the step": (
        "vitguard.draws.Draws.noised_all", lambda self, totals, deviation: dict(totals), "privacy",
    ),
    "no scaling of the sum": (
        "vitguard.defenses.privacy.optimizer.BookKeepingOptimizer.scale_grad", lambda self: None,
        "privacy",
    ),
    "no shuffle": (
        "vitguard.defenses.shuffle.masks.permute_inside",
        lambda draws, keys, mask, derangement: torch.arange(mask.shape[1]).expand(mask.shape),
        "shuffle with DAL",
    ),
    "no weight on the localization": (
        "vitguard.defenses.shuffle.installed.InstalledShuffle._weight", lambda self: 0.0,
        "shuffle with DAL",
    ),
    "other positions": (
        "vitguard.defenses.positions._computed", lambda kind, anatomy, like: like.clone(),
        "positions",
    ),
    "no noise in the update": (
        "vitguard.defenses.noise.GradientNoise.seal",
        lambda self, update, anatomy, draws: update, "noise",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("broken", BREAKS)
def test_a_defense_that_is_broken_turns_its_cell_red(broken, monkeypatch):
    path, instead, column = BREAKS[broken]
    monkeypatch.setattr(path, instead)
    with pytest.raises(AssertionError):
        compare(*named("plain", column), BUILT[0])


if __name__ == "__main__":
    sys.stdout.write(table())
