"""What the tests share: data, small models, and what an adversary sees of one update."""

# One thread for each process: two of them with two threads each spin on two cores, and a suite of
# four minutes takes an hour. OpenMP and MKL read this once, so it stands before torch and NumPy;
# workers of pytest-xdist and the processes that tests start inherit it. A value of your own wins.
import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, os.environ.get("OMP_NUM_THREADS", "1"))

# ruff: noqa: E402
import collections
import copy
import functools
import gc
import sys
from pathlib import Path
from typing import ClassVar

gc.disable()  # until the tests are collected: nothing of what is made until then is garbage

import hypothesis
import numpy as np
import pytest
import torch

CHECKED = os.environ.get("VITGUARD_SHAPES", "0") not in ("", "0")
"""Annotations are checked, which draws from Python's `random`."""
if CHECKED:
    from tests import shapes  # needs beartype; before vitguard is imported

    shapes.install()

from vitguard import data
from vitguard.core import Normalization
from vitguard.data import decoy_images
from vitguard.guard import protect
from vitguard.registry import parse_stack
from vitguard.threats import CuriousServer

# A busy machine is no failure: Hypothesis has no limit in milliseconds here.
hypothesis.settings.register_profile("no clock", deadline=None)
hypothesis.settings.load_profile("no clock")

if os.environ["OMP_NUM_THREADS"] == "1":  # a plugin may have imported torch before this file
    torch.set_num_threads(1)

if not torch.cuda.is_available():  # torch would keep each seed, and who called, for a GPU to come
    for _device in (torch.cuda, getattr(torch, "xpu", None)):
        if _device is not None:
            _device.manual_seed_all = lambda seed: None

# Audits share their decoys, of which an audit keeps two kinds; tests ask for many kinds in turn.
decoy_images._pool = functools.lru_cache(maxsize=16)(decoy_images._pool.__wrapped__)


def pytest_collection_finish():
    gc.freeze()  # thousands of tests and all modules: no later collection looks at them again
    gc.enable()


# A run without some packages skips tests: it writes their names to the file VITGUARD_SKIPPED, and a
# full run takes them along where VITGUARD_ALSO names that file. Nothing is run twice for it.


def pytest_runtest_logreport(report):
    if report.skipped and "VITGUARD_SKIPPED" in os.environ:
        with open(os.environ["VITGUARD_SKIPPED"], "a") as file:
            file.write(report.nodeid + "\n")


pytest_collectreport = pytest_runtest_logreport  # a whole file may be skipped


@pytest.hookimpl(tryfirst=True)  # before `-m "slow and not browser"` is applied
def pytest_collection_modifyitems(items):
    if "VITGUARD_ALSO" in os.environ:
        names = set(Path(os.environ["VITGUARD_ALSO"]).read_text().splitlines())
        for item in items:
            if {item.nodeid, item.nodeid.partition("::")[0]} & names:
                item.add_marker("slow")


@pytest.fixture(autouse=True)
def _probed_once(request, monkeypatch):
    """In the fast suite each kind of model is tried out once, and not each model of that kind.

    Only models made of their library's layers alone. The full suite tries each of them out, as the
    package does.
    """
    probe = sys.modules.get("vitguard.defenses.privacy.probe")
    fast = request.config.option.markexpr == "not slow and not browser"
    if probe is not None and fast and "probe" not in request.node.path.name:
        monkeypatch.setattr(probe, "_PROBED", Probed(probe._PROBED))


class Probed:
    """Stands for what is kept of each model that was tried out: one note for each kind of model."""

    kinds: ClassVar[dict] = collections.defaultdict(set)

    def __init__(self, by_model):
        self.by_model = by_model

    def setdefault(self, model, empty):
        libraries = {type(m).__module__.partition(".")[0] for m in model.modules()}
        if not libraries <= {"torch", "timm", "transformers", "vitguard"} or any(
            "forward" in m.__dict__ for m in model.modules()
        ):
            return self.by_model.setdefault(model, empty)
        return self.kinds[repr(model), str(next(model.parameters()).dtype)]


CIFAR_VIT = (
    "vit_tiny_patch16_224:img_size=32,patch_size=4,embed_dim=128,depth=4,num_heads=4,mlp_ratio=2,"
    "num_classes=10"
)
CIFAR_NORMALIZATION = Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


untraced = pytest.mark.skipif(
    CHECKED and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8),
    reason="older releases of torch cannot trace checked annotations",
)


@pytest.fixture
def unchecked():
    """What a test of wrong input needs where annotations are checked: to get past them."""
    if not CHECKED:
        yield
        return
    from jaxtyping import config

    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


def known(name):
    """Return a model name of timm; skip where this release has none such."""
    import timm

    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    return name


@pytest.fixture(scope="session")
def data_folder():
    """The research data (never part of the project); skips where there is none."""
    folder = os.environ.get("VITGUARD_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("VITGUARD_DATA does not name a data folder")
    return Path(folder)


@pytest.fixture(scope="session")
def cifar(data_folder):
    """The first 40 CIFAR-10 test images as (pixels in [0, 1], labels)."""
    sys.path.insert(0, str(data_folder))
    try:
        from load import cifar10  # type: ignore[import-not-found]

        images, labels = cifar10("test")[:2]
    finally:
        sys.path.remove(str(data_folder))
    pixels = torch.as_tensor(images[:40]).permute(0, 3, 1, 2).float() / 255
    return pixels, torch.as_tensor(labels[:40]).long()


@pytest.fixture(scope="session")
def cifar_vit(data_folder):
    """A ViT that others trained on CIFAR-10."""
    from vitguard.models import build_model, load_checkpoint

    model = build_model(CIFAR_VIT)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-5
    load_checkpoint(model, data_folder / "weights" / "cifar10_vit_a.safetensors")
    return model


@pytest.fixture(scope="session")
def photos():
    """Five sample photos, 16 x 16, pixels in [0, 1]."""
    return data.sample_images((16, 16), count=5).pixels


@pytest.fixture(scope="session")
def photo(photos):
    return photos[:1]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def small_vit(name="vit_tiny_patch16_224", *, seed=0, **changes):
    """A timm ViT of 16 tokens, every parameter moved away from its initial value."""
    try:
        return copy.deepcopy(_made(name, seed, **changes))
    except TypeError:  # a change that has no hash
        return _made.__wrapped__(name, seed, **changes)


@functools.lru_cache(maxsize=64)
def _made(name, seed, **changes):
    import timm

    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 96, "depth": 2, "num_heads": 4}
    biased = changes.pop("proj_bias", True)  # older releases of timm have no such argument
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model(name, **{**sizes, "num_classes": 10, **changes})
        for block in () if biased else model.blocks:
            for layer in (block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                layer.register_parameter("bias", None)
        return moved(model)


def drawn(model, seed=0):
    """Return the model with random weights that are the same in every release of torch."""
    chance = np.random.default_rng(seed)
    with torch.no_grad():
        for p in model.parameters():
            fresh = torch.from_numpy(chance.standard_normal(p.shape)).to(p)
            p.copy_(0.05 * fresh + (p.ndim == 1 and float(p.mean().round())))
    return model


def moved(model, scale=0.02):
    """Move every parameter a little: zero biases and unit gammas would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model


def observe(
    model, pixels, labels=None, *, defenses="none", withhold=(), normalization=None, seed=0, **how
):
    """Return what a curious server sees of one update of a copy of `model`."""
    stack = parse_stack(defenses) if isinstance(defenses, str) else defenses
    normalization = normalization or Normalization()
    secret = torch.Generator().manual_seed(1000 + seed)
    guard = protect(copy.deepcopy(model).train(), stack, generator=secret)
    like = next(model.parameters())
    labels = torch.arange(len(pixels)) % 10 if labels is None else labels
    with guard.rewound():
        update = guard.update(normalization.apply(pixels).to(like), labels, **how)
    return CuriousServer(tuple(withhold)).view(guard, update, normalization)


@pytest.fixture(scope="session", name="small_vit")
def _small_vit():
    return small_vit


@pytest.fixture(scope="session", name="moved")
def _moved():
    return moved


@pytest.fixture(scope="session", name="observe")
def _observe():
    return observe


@pytest.fixture(scope="session")
def attacked(observe):
    """`attacked(labels, withhold=(), pixels=None)`: a view of an update, and its photos.

    What the matching attacks are tried on: sample photos or `pixels` on an untrained ViT of 16
    tokens of width 64, timm's own initialisation.
    """
    import timm

    def make(labels, withhold=(), pixels=None):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = timm.create_model(
                "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=64, depth=2,
                num_heads=2, num_classes=10,
            )  # fmt: skip
        samples = data.sample_images((16, 16), count=len(labels)).pixels
        truth = samples if pixels is None else pixels
        return observe(model, truth, torch.tensor(labels), withhold=withhold), truth

    return make
