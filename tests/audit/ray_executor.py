"""Ray as an executor, as the page on long runs gives it: a class of a module, for it is sent."""

from concurrent.futures import Executor

import ray


class RayExecutor(Executor):
    def submit(self, fn, /, *args, **kwargs):
        return ray.remote(fn).remote(*args, **kwargs).future()
