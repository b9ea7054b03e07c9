"""The cells of the table in docs/integrations.md that refuse, each on the real framework.

One line of an error, before any weight has moved.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import vitguard as vg
from tests.conftest import small_vit
from vitguard.errors import VitguardError

pytest.importorskip("opacus")
PRIVATE = "privacy:noise=0.5,clip=1,delta=0.01,accountant=rdp"
DATA = TensorDataset(
    torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 10
)


def mixed(images, labels):
    """As mixup does."""
    targets = F.one_hot(labels, 10).to(images)
    return 0.6 * images + 0.4 * images.flip(0), 0.6 * targets + 0.4 * targets.flip(0)


# one function for each framework: train a protected model in this way


def by_transformers(model, how, folder):
    one = pytest.importorskip("tests.integrations.test_transformers")
    from accelerate.utils import DistributedType

    class Spread(one.Trainer):  # without a GPU the arguments themselves refuse fsdp
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.accelerator.state.distributed_type = DistributedType.FSDP

    class Mixing(one.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            images, targets = mixed(inputs["pixel_values"], inputs["labels"])
            return F.cross_entropy(model(pixel_values=images).logits, targets)

    own = {"mixing": Mixing, "fsdp": Spread}.get(how, one.Trainer)
    kind = type("Own", (one.GuardMixin, own), {})
    made = one.arguments(folder, per_device_train_batch_size=8)
    for name in {"fp16", "torch_compile"} & {how}:
        setattr(made, name, True)  # as on a GPU: without one the arguments themselves refuse fp16
    kind(model=model, args=made, train_dataset=one.Photos(), data_collator=one.collate_fn).train()


def by_lightning(model, how, folder):
    one = pytest.importorskip("tests.integrations.test_lightning")
    from lightning.pytorch.plugins import MixedPrecision
    from lightning.pytorch.strategies import ModelParallelStrategy

    class Lit(one.L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = model

        def configure_model(self):
            if how == "fsdp":
                from torch.distributed.fsdp import fully_shard

                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch, batch_idx):
            images, labels = mixed(*batch) if how == "mixing" else batch
            return F.cross_entropy(self.net(images), labels)

        def train_dataloader(self):
            return DataLoader(DATA, 8)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Guarded(one.GuardMixin, Lit):
        def on_fit_start(self):
            if how == "compiled part":
                self.net = torch.compile(self.net, backend="eager")

    module, settings = Guarded(), {}
    if how == "fp16":
        scaler = torch.amp.GradScaler("cpu")
        settings["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    if how == "half weights":
        settings["precision"] = "16-true"
    if how == "fsdp":
        settings["strategy"] = ModelParallelStrategy(1, 1)
    one.fit(
        torch.compile(module, backend="eager") if how == "torch_compile" else module,
        folder=folder, accumulate_grad_batches=2 if how == "accumulation" else 1, **settings,
    )  # fmt: skip


def by_accelerate(model, how, folder):
    accelerate = pytest.importorskip("accelerate")
    from accelerate.utils import DistributedType

    from vitguard.integrations.accelerate import prepare

    accelerator = accelerate.Accelerator(
        cpu=True, mixed_precision="fp16" if how == "fp16" else None,
        dynamo_backend="eager" if how == "torch_compile" else None,
        gradient_accumulation_steps=2 if "accumulation" in how else 1,
    )  # fmt: skip
    if how == "fsdp":  # without a GPU accelerate passes over its plugin
        accelerator.state.distributed_type = DistributedType.FSDP
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(DATA, 8)
    if how == "prepared before, accumulation":
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        optimizer, loader = vg.Guard.of(model).prepare(optimizer, loader)
    elif how == "accumulation by hand":
        optimizer, loader = vg.Guard.of(model).prepare(optimizer, loader)
        model, optimizer = accelerator.prepare(model, optimizer)
    else:
        model, optimizer, loader = prepare(accelerator, model, optimizer, loader)
    for batch in loader:
        with accelerator.accumulate(model):
            images, labels = mixed(*batch) if how == "mixing" else batch
            accelerator.backward(F.cross_entropy(model.train()(images), labels))
            optimizer.step()
            optimizer.zero_grad()


def in_a_loop(model, how, folder, scale=None):
    """What a copy of timm's script does, and a plain loop around a model of PEFT."""
    guard = vg.Guard.of(model.get_base_model() if hasattr(model, "get_base_model") else model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, loader = guard.prepare(torch.optim.SGD(trained, lr=0.1), DataLoader(DATA, 8))
    if how == "fsdp":
        spread(model)
    running = torch.compile(model, backend="eager") if how == "torch_compile" else model
    for number, batch in enumerate(loader):
        images, labels = mixed(*batch) if how == "mixing" else batch
        loss = F.cross_entropy(running.train()(images), labels)
        if how == "fp16":
            scale(loss, optimizer)
        else:
            loss.backward()
            if how != "accumulation" or number % 2:
                optimizer.step()
        optimizer.zero_grad()


def spread(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


def by_timm(model, how, folder):
    from timm.data import Mixup
    from timm.utils import NativeScaler

    if how == "mixing":
        mix = Mixup(mixup_alpha=1.0, prob=1.0, num_classes=10)
        guard = vg.Guard.of(model)
        optimizer, loader = guard.prepare(torch.optim.SGD(model.parameters(), lr=0.1),
                                          DataLoader(DATA, 8))  # fmt: skip
        for images, labels in loader:
            if len(images) % 2:
                with pytest.raises(AssertionError, match="should be even"):
                    mix(images, labels)
                loader.skip()
                continue
            F.cross_entropy(model.train()(images), mix(images, labels)[1]).backward()
            optimizer.step()
        return
    scaler = NativeScaler("cpu")
    in_a_loop(
        model, how, folder,
        lambda loss, optimizer: scaler(loss, optimizer, parameters=model.parameters()),
    )  # fmt: skip


def by_peft(model, how, folder):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["head"])
    scaler = torch.amp.GradScaler("cpu")

    def scale(loss, optimizer):
        scaler.scale(loss).backward()
        scaler.step(optimizer)

    in_a_loop(peft.get_peft_model(model, config), how, folder, scale)


SCALER = "float16|fp16|GradScaler"
COMPILED = "not compiled"
SPREAD = "FSDP"
MIXED = "targets that mix two"
STEPS = "physical_batch"
REFUSED = {
    by_transformers: {"fp16": SCALER, "torch_compile": COMPILED, "fsdp": SPREAD, "mixing": MIXED},
    by_lightning: {
        "fp16": SCALER, "half weights": "float32 or float64", "torch_compile": COMPILED,
        "compiled part": COMPILED, "fsdp": SPREAD, "mixing": MIXED, "accumulation": STEPS,
    },
    by_accelerate: {
        "fp16": SCALER, "torch_compile": COMPILED, "fsdp": SPREAD, "mixing": MIXED,
        "accumulation": STEPS, "accumulation by hand": STEPS,
        "prepared before, accumulation": r"integrations\.accelerate\.prepare",
    },
    by_timm: {
        "fp16": SCALER, "torch_compile": COMPILED, "fsdp": SPREAD, "mixing": MIXED,
        "accumulation": STEPS,
    },
    by_peft: {
        "fp16": SCALER, "torch_compile": COMPILED, "fsdp": SPREAD, "mixing": MIXED,
        "accumulation": STEPS,
    },
}  # fmt: skip
CELLS = [(train, how) for train, cells in REFUSED.items() for how in cells]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("train, how", CELLS, ids=[f"{t.__name__}-{h}" for t, h in CELLS])
def test_what_privacy_cannot_have_is_refused_in_one_line_before_a_weight_moves(
    train, how, tmp_path, group
):
    if how == "fsdp" and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip(f"torch {torch.__version__} does not run FSDP2 on a CPU")
    if how == "fsdp" and train in (by_timm, by_peft):
        group()
    torch._dynamo.reset()
    if train is by_transformers:
        model = pytest.importorskip("tests.integrations.test_transformers").build()
    else:
        model = small_vit(depth=1)
    vg.protect(model, PRIVATE, generator=torch.Generator().manual_seed(4))
    before = {n.replace(".base_layer", ""): p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(Exception, match=REFUSED[train][how]) as caught:
        train(model, how, tmp_path)
    told = caught.value
    while told is not None and not isinstance(told, VitguardError):
        told = told.__cause__ or told.__context__
    assert told is not None, caught.value
    for name, p in model.named_parameters():
        if name in before:
            whole = p.full_tensor() if hasattr(p, "full_tensor") else p
            assert torch.equal(whole.detach().float(), before[name].half().float()
                               if how == "half weights" else before[name]), name  # fmt: skip
