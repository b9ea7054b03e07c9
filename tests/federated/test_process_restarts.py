"""Privacy over rounds, each in a process of its own: only what the guard saved goes on."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("dp_accounting")

from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant

PROCESSES, STEPS, RECORDS, BATCH = 4, 3, 12, 4

ROUND = """
import json, sys
from pathlib import Path
import timm, torch
import vitguard as vg

kind, saved = sys.argv[1], Path(sys.argv[2])
model = timm.create_model(
    "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2,
    num_classes=2,
)
record = vg.DifferentialPrivacy(noise=2.0, delta=1e-3)
client = vg.ClientPrivacy(noise=2.0, delta=1e-3)
guard = vg.protect(model, [record if kind == "record" else client])
if saved.exists():
    guard.load_state_bytes(saved.read_bytes())
images, labels = torch.rand(RECORDS, 3, 8, 8), torch.arange(RECORDS) % 2
if kind == "record":
    data = torch.utils.data.TensorDataset(images, labels)
    loader = torch.utils.data.DataLoader(data, batch_size=BATCH)
    optimizer, loader = guard.prepare(torch.optim.SGD(model.parameters(), lr=0.1), loader)
    for x, y in loader:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
else:
    for _ in range(STEPS):
        guard.update(images[:BATCH], labels[:BATCH], learning_rate=0.1)
saved.write_bytes(guard.state_bytes())
print(json.dumps(guard.privacy_spent().epsilon))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rate"), [("record", BATCH / RECORDS), ("client", 1.0)])
def test_rounds_in_processes_of_their_own_are_the_closed_accounting(tmp_path, kind, rate):
    sizes = f"RECORDS, BATCH, STEPS = {RECORDS}, {BATCH}, {STEPS}\n"
    said = []
    for _ in range(PROCESSES):
        command = [sys.executable, "-c", sizes + ROUND, kind, str(tmp_path / "ledger")]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        said.append(json.loads(ran.stdout.splitlines()[-1]))
    for number, epsilon in enumerate(said, 1):
        accountant = PLDAccountant()
        event = GaussianDpEvent(2.0)
        event = event if rate == 1 else PoissonSampledDpEvent(rate, event)
        accountant.compose(SelfComposedDpEvent(event, number * STEPS))
        assert epsilon == pytest.approx(accountant.get_epsilon(1e-3), rel=0.02)
