"""What trainers keep for a process is put back after each test: accelerate's state, groups."""

import os
import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh():
    before = dict(os.environ)
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(True)
        state.GradientState._reset_state()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def group(tmp_path):
    """A function that makes a process group of one, for FSDP."""

    def make():
        if not torch.distributed.is_gloo_available():
            pytest.skip("torch without gloo")
        file = f"file://{tmp_path}/group"
        torch.distributed.init_process_group("gloo", init_method=file, rank=0, world_size=1)

    return make
