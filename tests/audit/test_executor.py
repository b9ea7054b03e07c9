"""An audit by an executor says what it says without one, and a lost job is never a defense."""

import multiprocessing
import os
import pickle
import signal
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F

from vitguard.attacks.base import Attack
from vitguard.attacks.fgsm import FGSM
from vitguard.attacks.inverting import InvertingGradients
from vitguard.attacks.ladder import Ladder
from vitguard.attacks.position import PositionInversion
from vitguard.attacks.span import SpanInversion
from vitguard.audit import audit, audit_update
from vitguard.audit.attempts import INTERRUPTED
from vitguard.core import Guess
from vitguard.data import assign_labels
from vitguard.defenses.noise import GradientNoise
from vitguard.errors import InputError, Unprotected
from vitguard.federated.local import LocalClient, LocalFederation
from vitguard.guard import protect
from vitguard.models import normalization_of

FROZEN = "positions:kind=frozen"
STACKS = {"noise": [GradientNoise(0.01)], "sincos": "positions:kind=sincos"}


class Carried(Executor):
    """Runs jobs at once, on what a process would get: all that goes in or out is pickled."""

    def __init__(self):
        self.sent: list[bytes] = []
        self.returned: list[bytes] = []

    def submit(self, fn, /, *args, **kwargs):
        future: Future[Any] = Future()
        try:
            self.sent.append(pickle.dumps((fn, args, kwargs)))
            work, given, how = pickle.loads(self.sent[-1])
            self.returned.append(pickle.dumps(work(*given, **how)))
            future.set_result(pickle.loads(self.returned[-1]))
        except BaseException as error:  # noqa: BLE001
            future.set_exception(error)
        return future


class Failing(Executor):
    """Loses the jobs from the `first` to the one before `last`, as a pool whose worker died."""

    def __init__(self, first=0, last=10**6, error=None, at_once=False):
        self.first, self.last, self.at_once, self.count = first, last, at_once, 0
        self.error = error or BrokenProcessPool("a process ended abruptly\nand more lines")

    def submit(self, fn, /, *args, **kwargs):
        self.count += 1
        future: Future[Any] = Future()
        if self.first < self.count <= self.last:
            if self.at_once:
                raise self.error
            future.set_exception(self.error)
        else:
            future.set_result(fn(*args, **kwargs))
        return future


@dataclass(frozen=True)
class Ends(Attack):
    """Ends its process, or breaks off, where the model is defended."""

    name: ClassVar[str] = "ends"
    family: ClassVar[str] = "closed-form"
    how: str = "exit"

    def run(self, view, generator):
        if view.traits.positions == "learnable":
            return PositionInversion().run(view, generator)
        if self.how == "exit":
            os._exit(1)
        if self.how == "interrupt":
            raise KeyboardInterrupt
        raise IndexError("target -1")


@dataclass(frozen=True)
class Climbs(Attack):
    """Has parts, so that a verdict asks what one of them does alone on the control."""

    name: ClassVar[str] = "climbs"
    family: ClassVar[str] = "ladder"

    def parts(self):
        return {"position": PositionInversion()}

    def run(self, view, generator):
        details = {"outcomes": {"position": "ran"}, "rungs": {"position": "ran"}}
        if view.traits.positions == "learnable":
            guess = PositionInversion().run(view, generator)
            return replace(guess, details={**guess.details, **details})
        return Guess(torch.full((1, *view.image_shape), 0.5), details=details)


@dataclass(frozen=True)
class Drawn(Attack):
    """Draws its image: it tells another seed, or another place among the draws."""

    name: ClassVar[str] = "drawn"
    family: ClassVar[str] = "closed-form"

    def run(self, view, generator):
        return Guess(torch.rand(1, *view.image_shape, generator=generator))


def labelled(pixels):
    return pixels, assign_labels(len(pixels), 10)


def told(report):
    """What a report says, without how long it took, and its pictures as bytes."""
    said = report.to_json()
    for finding in said["findings"]:
        finding.pop("seconds")
    kept = [vars(f.images) for f in report.findings if f.images is not None]
    return said, [
        t.numpy().tobytes() for one in kept for t in one.values() if isinstance(t, torch.Tensor)
    ]


ATTACKS = [PositionInversion(), Climbs(), Drawn(), FGSM()]


@pytest.fixture
def audited(small_vit, photos):
    model = small_vit(proj_drop_rate=0.3)

    def made(**how):
        how = {"defenses": STACKS, "attacks": ATTACKS, "batch_size": 1, **how}
        return audit(model, labelled(photos[:2]), seed=4, **how)

    return made


@pytest.fixture
def pool():
    """A pool of processes that start from nothing."""
    made = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    yield made
    made.shutdown(cancel_futures=True)


@pytest.mark.slow
def test_threads_and_pickled_jobs_give_the_report_that_one_process_gives(audited):
    torch.manual_seed(1)
    alone = told(audited())
    state = torch.get_rng_state()
    assert alone[1] and {f["verdict"] for f in alone[0]["findings"]} >= {"leaks", "resisted"}
    with ThreadPoolExecutor(3) as threads:
        assert told(audited(executor=threads)) == alone
        assert threads.submit(int, "3").result() == 3, "the executor is not the audit's to end"
    assert told(audited(executor=Carried())) == alone
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_processes_that_start_from_nothing_give_the_same_report(audited, pool):
    alone = told(audited())
    assert told(audited(executor=pool)) == alone


def test_dask_gives_the_same_report(audited):
    distributed = pytest.importorskip("distributed", reason="needs dask: pip install distributed")
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        assert told(audited(executor=client.get_executor())) == told(audited())


@pytest.mark.slow
def test_ray_gives_the_same_report(audited):
    ray = pytest.importorskip("ray", reason="needs ray: pip install ray")
    from tests.audit.ray_executor import RayExecutor

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        assert told(audited(executor=RayExecutor())) == told(audited())
    finally:
        ray.shutdown()


@pytest.mark.slow
def test_rounds_by_an_executor_say_the_same(small_vit, photos):
    clients = {
        n: LocalClient(photos[i : i + 1], assign_labels(2, 10)[i : i + 1])
        for i, n in enumerate(("ana", "bea"))
    }
    seeded = torch.Generator().manual_seed(0)
    federation = LocalFederation(small_vit(), clients, FROZEN, generator=seeded, bound=2.0)
    seen = federation.round()
    attacks = [PositionInversion(), SpanInversion()]
    alone = told(audit(seen, attacks=attacks))
    assert told(audit(seen, attacks=attacks, executor=Carried())) == alone


@pytest.mark.parametrize(
    "truth",
    [pytest.param(True, marks=pytest.mark.slow, id="truth"), pytest.param(False, id="no truth")],
)
def test_an_update_by_itself_is_audited_by_an_executor_too(small_vit, photo, truth):
    model = small_vit()
    guard = protect(model.train(), FROZEN)
    inputs = normalization_of(model).apply(photo[0])[None]
    update = guard.update(inputs, torch.tensor([3]))
    how = {"defenses": FROZEN, "attacks": ATTACKS, "truth": photo if truth else None}
    alone, seen, carried = told(audit_update(small_vit(), update, **how)), [], Carried()
    assert told(audit_update(small_vit(), update, workers=2, **how)) == alone
    watched = {"executor": carried, "progress": lambda *told: seen.append(told)}
    assert told(audit_update(small_vit(), update, **watched, **how)) == alone
    assert [done for done, total, _ in seen if total == 6] == list(range(1, 7))
    assert len(carried.sent) >= 6, "the control and the update, by three attacks"
    lost = audit_update(small_vit(), update, executor=Failing(), **how).findings
    assert {f.verdict for f in lost if f.attack != "fgsm"} == {"inconclusive"}


@pytest.mark.slow
def test_every_attack_on_every_configuration_is_a_job_of_its_own(audited):
    seen = []
    carried = Carried()
    audited(executor=carried, progress=lambda *told: seen.append(told))
    own = [done for done, total, _ in seen if total == 18]  # 3 runs, 2 batches, 3 on updates
    assert own == list(range(1, 19))
    assert len(carried.sent) >= 18 + 3 + 2  # FGSM on 3; a part alone on the control's 2 batches


@pytest.mark.slow
def test_the_decoys_of_a_batch_are_not_sent_back(audited):
    carried = Carried()
    audited(executor=carried, attacks=[PositionInversion()])
    assert max(map(len, carried.returned)) < 0.1 * min(map(len, carried.sent))


def test_tensors_are_sent_as_copies_and_never_as_shared_memory(small_vit, photo):
    from multiprocessing.reduction import ForkingPickler

    class Torch(Carried):
        def submit(self, fn, /, *args, **kwargs):
            ForkingPickler.dumps((fn, args, kwargs))
            return super().submit(fn, *args, **kwargs)

    model = small_vit()
    audit(model, labelled(photo), attacks=[PositionInversion()], executor=Torch())
    assert not any(p.is_shared() for p in model.parameters()) and not photo.is_shared()


@pytest.mark.parametrize("at_once", [False, True])
def test_a_lost_job_is_an_inconclusive_finding_that_says_so(audited, at_once):
    lost = audited(executor=Failing(at_once=at_once)).to_json()
    rows = [(d, a) for d in ("none", *STACKS) for a in ("position", "climbs", "drawn")]
    rows += [(d, "fgsm") for d in ("none", *STACKS)]
    assert [(f["defense"], f["attack"]) for f in lost["findings"]] == rows
    for finding in lost["findings"]:
        assert finding["verdict"] == "inconclusive"
        assert finding["reason"] == (
            "the executor did not run it: BrokenProcessPool: a process ended abruptly"
        )


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 2])
def test_nothing_resists_whose_job_or_whose_control_was_lost(small_vit, photo, first):
    """Of four jobs, the two of the control or the two of the defense are lost."""
    attacks = [PositionInversion(), Climbs()]
    how = {"defenses": "positions:kind=sincos", "attacks": attacks}
    alone = audit(small_vit(), labelled(photo), **how)
    assert [f.verdict for f in alone.findings].count("resisted") == 1
    executor = Failing(first, first + 2)
    report = audit(small_vit(), labelled(photo), executor=executor, **how)
    assert len(report.findings) == 4
    assert "resisted" not in [f.verdict for f in report.findings]
    assert [f.verdict == "leaks" for f in report.findings[:2]] == [first == 2] * 2
    assert report.gate(max_gain=6) != 0


@pytest.mark.slow
def test_a_batch_that_is_lost_leaves_its_configuration_undecided(small_vit, photos):
    how = {"defenses": "positions:kind=sincos", "attacks": [Climbs()], "batch_size": 1}
    executor = Failing(3, 4)  # control 1, defense 1, control 2, defense 2
    report = audit(small_vit(), labelled(photos[:2]), executor=executor, **how)
    assert [f.verdict for f in report.findings] == ["leaks", "inconclusive"]
    assert "1 of 2 batches: the executor did not run it" in report.findings[1].reason


@pytest.mark.slow
def test_a_process_that_dies_costs_findings_and_no_row(small_vit, photo, pool):
    how = {"defenses": FROZEN, "attacks": [Ends(), PositionInversion()]}
    report = audit(small_vit(), labelled(photo), executor=pool, **how)
    found = {(f.defense, f.attack): f for f in report.findings}
    assert len(found) == 4 and found["none", "ends"].verdict == "leaks"
    dead = found[FROZEN, "ends"]
    assert dead.verdict == "inconclusive" and "BrokenProcessPool" in dead.reason
    assert "resisted" not in {f.verdict for f in report.findings} and not report.interrupted


def test_an_attack_that_breaks_there_fails_as_it_does_here(small_vit, photo):
    how = {"defenses": FROZEN, "attacks": [Ends("index")]}
    alone = told(audit(small_vit(), labelled(photo), **how))
    assert told(audit(small_vit(), labelled(photo), executor=Carried(), **how)) == alone
    assert alone[0]["findings"][1]["reason"] == "the attack failed: IndexError: target -1"


def test_what_does_not_pickle_is_said_in_one_line_and_runs_in_threads(small_vit, photo):
    how = {"attacks": [PositionInversion()], "loss": lambda *given: F.cross_entropy(*given)}
    (lost,) = audit(small_vit(), labelled(photo), executor=Carried(), **how).findings
    assert lost.verdict == "inconclusive" and "\n" not in lost.reason
    assert "cannot be sent to another process" in lost.reason and "threads" in lost.reason
    with ThreadPoolExecutor(1) as threads:
        (found,) = audit(small_vit(), labelled(photo), executor=threads, **how).findings
    assert found.verdict == "leaks"


@dataclass(frozen=True)
class Refuses(Attack):
    """Finds that a defense did not act."""

    name: ClassVar[str] = "refuses"
    family: ClassVar[str] = "closed-form"

    def run(self, view, generator):
        raise Unprotected("it did not act")


def test_a_defense_that_did_not_act_is_raised_and_the_rest_is_cancelled(small_vit, photo):
    ran = []

    class Counted(Carried):
        """Runs the first job, and would run the others when it has time."""

        def submit(self, fn, /, *args, **kwargs):
            ran.append(Future() if ran else super().submit(fn, *args, **kwargs))
            return ran[-1]

    with pytest.raises(Unprotected, match="it did not act"):
        audit(
            small_vit(), labelled(photo), attacks=[Refuses(), PositionInversion(), SpanInversion()],
            executor=Counted(),
        )  # fmt: skip
    assert [one.cancelled() for one in ran] == [False, True, True]


@pytest.mark.slow
def test_an_interrupt_lets_what_runs_end_and_skips_what_has_not_begun(small_vit, photo):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:

        def stop(progress):
            if progress.iteration == 2:
                signal.raise_signal(signal.SIGINT)  # the main thread takes it, as with Ctrl-C

        attacks = [InvertingGradients(iterations=20, watch=stop), PositionInversion(), FGSM()]
        with ThreadPoolExecutor(1) as threads:
            report = audit(
                small_vit(), labelled(photo), defenses=FROZEN, attacks=attacks, executor=threads
            )
    finally:
        signal.signal(signal.SIGINT, before)
    found = {(f.defense, f.attack): f for f in report.findings}
    assert report.interrupted and len(found) == 6
    assert found["none", "inverting"].details["iterations"] == 20
    for key in ((FROZEN, "inverting"), (FROZEN, "position"), ("none", "fgsm"), (FROZEN, "fgsm")):
        assert (found[key].verdict, found[key].reason) == ("inconclusive", INTERRUPTED)
    assert any("keyboard interrupt" in note for note in report.notes)


def test_an_interrupt_in_a_worker_ends_the_audit_as_one_here_does(small_vit, photo):
    attacks = [Ends("interrupt"), PositionInversion(), FGSM()]
    with ThreadPoolExecutor(1) as threads:
        report = audit(
            small_vit(), labelled(photo), defenses=FROZEN, attacks=attacks, executor=threads
        )
    found = {(f.defense, f.attack): f for f in report.findings}
    assert report.interrupted and found["none", "ends"].verdict == "leaks"
    assert found[FROZEN, "ends"].reason == found[FROZEN, "fgsm"].reason == INTERRUPTED


@pytest.mark.slow
def test_an_attack_in_a_worker_keeps_the_file_it_goes_on_from(small_vit, photo, tmp_path):
    attack = InvertingGradients(iterations=4, resume=str(tmp_path / "run.pt"))
    alone = audit(small_vit(), labelled(photo), attacks=[replace(attack, resume=None)])
    carried = audit(small_vit(), labelled(photo), attacks=[attack], executor=Carried())
    assert [p.name for p in tmp_path.iterdir()] == ["run-control-0.pt"]
    again = audit(small_vit(), labelled(photo), attacks=[attack])
    assert told(again)[1] == told(carried)[1] == told(alone)[1]


@pytest.mark.slow
def test_the_ladder_ends_at_the_same_work_in_a_thread_as_in_this_one(small_vit, photo):
    how = {"defenses": "shuffle:ratio=0.5", "attacks": [Ladder(seconds=2)]}
    alone = told(audit(small_vit(), labelled(photo), **how))
    with ThreadPoolExecutor(2) as threads:
        assert told(audit(small_vit(), labelled(photo), executor=threads, **how)) == alone


def test_workers_beside_an_executor_and_what_is_none_are_refused(small_vit, photo):
    with ThreadPoolExecutor(1) as threads, pytest.raises(InputError, match="workers or an exec"):
        audit(small_vit(), labelled(photo), executor=threads, workers=2)
    with pytest.raises(InputError, match=r"a concurrent\.futures\.Executor, got int"):
        audit(small_vit(), labelled(photo), executor=4)
