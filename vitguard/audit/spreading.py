"""Where the work of an audit is done: here, in threads of its own, or by a given executor."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import (
    CancelledError,
    Executor,
    Future,
    ThreadPoolExecutor,
    as_completed,
    wait,
)
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from vitguard.audit.attempts import INTERRUPTED
from vitguard.errors import VitguardError, expected

__all__ = ["Job", "Progress", "Work"]

Progress = Callable[[int, int, str], None]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Job(Generic[Result]):
    """A piece of an audit that says the same wherever it runs: all it draws is seeded by its place.

    Args:
        title: What the progress is told.
        run: Takes the event that ends the audit, and sets it where it is interrupted.
        lost: The result where it was not run, by the reason.
        whole: Puts back what `run` left out of its result, for it is here already.
    """

    title: str
    run: Callable[[threading.Event], Result]
    lost: Callable[[str], Result]
    whole: Callable[[Result], Result] = lambda result: result


class Work:
    """Runs the jobs of an audit.

    `stop` is set by a keyboard interrupt: what has not begun then is not run. With one worker the
    interrupt reaches the job that is running; with several, or an executor, these come to their
    end first, unless the interrupt reaches their process too.

    Args:
        workers: Threads; 1 for none.
        executor: In their place. It is not shut down.

    Raises:
        InputError: Both were asked for, or it is no executor.
    """

    def __init__(self, workers: int = 1, executor: Executor | None = None) -> None:
        if executor is not None and not isinstance(executor, Executor):
            raise expected(
                "a concurrent.futures.Executor", type(executor).__name__,
                "Give a ProcessPoolExecutor, or client.get_executor() of a Dask client.",
            )  # fmt: skip
        if executor is not None and workers > 1:
            raise expected(
                "workers or an executor", "both", "An executor has workers of its own: leave out "
                "workers.",
            )  # fmt: skip
        self.stop = threading.Event()
        self.executor, self.workers = executor, workers

    def done(self, jobs: Sequence[Job[Result]], progress: Progress | None = None) -> list[Result]:
        """Run all jobs and return their results in the same order.

        What becomes of a job in an executor's hands, such as a process that dies or something that
        cannot be sent to it, is a lost job. What vitguard raises on purpose is raised here too.
        """
        told = _Told(progress, len(jobs))
        if self.executor is not None:
            return self._elsewhere(self.executor, jobs, told)
        if self.workers <= 1:  # threads get no interrupt
            return [self._here(job, told) for job in jobs]
        with ThreadPoolExecutor(max_workers=self.workers) as pool:
            running = [
                pool.submit(lambda j: told(j, j.whole(j.run(self.stop))), job) for job in jobs
            ]
            while not all(one.done() for one in running):
                try:
                    wait(running)
                except KeyboardInterrupt:  # a second one cannot hurry them either
                    self.stop.set()
            return [one.result() for one in running]

    def _here(self, job: Job[Result], told: _Told) -> Result:
        try:
            return told(job, job.whole(job.run(self.stop)))
        except KeyboardInterrupt:  # outside of the attack, which keeps its best
            self.stop.set()
            return job.lost(INTERRUPTED)

    def _elsewhere(
        self, executor: Executor, jobs: Sequence[Job[Result]], told: _Told
    ) -> list[Result]:
        results: dict[int, Result] = {}
        running: dict[Future[Any], int] = {}
        try:
            for i, job in enumerate(jobs):
                if self.stop.is_set():
                    break
                try:
                    running[executor.submit(_run, _Parcel(job.run))] = i
                except KeyboardInterrupt:
                    self.stop.set()
                except Exception as error:  # noqa: BLE001
                    results[i] = told(job, job.lost(_lost(error)))
            while left := [f for f, i in running.items() if i not in results and not f.cancelled()]:
                try:
                    for future in as_completed(left):
                        i = running[future]
                        result = self._result(jobs[i], future)
                        results[i] = told(jobs[i], result)
                        if self.stop.is_set():
                            break
                except KeyboardInterrupt:
                    self.stop.set()
                if self.stop.is_set():  # what has begun comes to its end
                    _cancel(running)
        finally:
            _cancel(running)
        why = INTERRUPTED if self.stop.is_set() else "the executor did not run it: cancelled"
        return [results[i] if i in results else job.lost(why) for i, job in enumerate(jobs)]

    def _result(self, job: Job[Result], future: Future[Any]) -> Result:
        """Return what came of a job. `stop` is set where it was interrupted in its process."""
        error = CancelledError() if future.cancelled() else future.exception()
        if error is None:
            result, interrupted = future.result().content
            if interrupted:
                self.stop.set()
            return job.whole(result)
        if isinstance(error, VitguardError):
            raise error
        if isinstance(error, KeyboardInterrupt):
            self.stop.set()
        return job.lost(INTERRUPTED if self.stop.is_set() else _lost(error))


class _Told:
    """Counts the jobs that are done, and tells the progress."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, job: Job[Result], result: Result) -> Result:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total, job.title)
        return result


class _Parcel:
    """Something on its way to another process, as plain bytes.

    torch would put tensors into memory that both processes share: a descriptor for each tensor, and
    one process could change what the other reads.
    """

    def __init__(self, content: Any) -> None:
        self.content = content

    def __reduce__(self) -> tuple[Callable[[bytes], _Parcel], tuple[bytes]]:
        try:
            return _opened, (pickle.dumps(self.content, protocol=5),)
        except Exception as error:
            raise pickle.PicklingError(
                f"it cannot be sent to another process ({_line(error)}): give functions and "
                "classes of a module, or an executor with threads"
            ) from error


def _opened(data: bytes) -> _Parcel:
    return _Parcel(pickle.loads(data))


def _run(parcel: _Parcel) -> _Parcel:
    """Run a job in a worker; return its result and whether it was interrupted there."""
    stop = threading.Event()
    return _Parcel((parcel.content(stop), stop.is_set()))


def _cancel(running: dict[Future[Any], int]) -> None:
    for future in running:
        future.cancel()


def _lost(error: BaseException) -> str:
    return f"the executor did not run it: {_line(error)}"


def _line(error: BaseException) -> str:
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
