"""Privacy over rounds, each in a process of its own: only what the guard saved goes on."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("dp_accounting")

from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant

PROCESSES, STEPS, RECORDS, BATCH = 3, 3, 12, 4

ROUND = """
import json, sys
from pathlib import Path
import timm, torch
import vitguard as vg

RECORDS, BATCH, STEPS, folder = *map(int, sys.argv[1:4]), Path(sys.argv[4])
images, labels = torch.rand(RECORDS, 3, 8, 8), torch.arange(RECORDS) % 2
said = {}
for kind in (vg.DifferentialPrivacy, vg.ClientPrivacy):
    saved = folder / kind.__name__
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2,
        num_classes=2,
    )
    guard = vg.protect(model, [kind(noise=2.0, delta=1e-3)])
    if saved.exists():
        guard.load_state_bytes(saved.read_bytes())
    if kind is vg.DifferentialPrivacy:
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
    said[kind.__name__] = guard.privacy_spent().epsilon
print(json.dumps(said))
"""


@pytest.mark.slow
def test_rounds_in_processes_of_their_own_are_the_closed_accounting(tmp_path):
    sizes = [str(number) for number in (RECORDS, BATCH, STEPS)]
    for number in range(1, PROCESSES + 1):
        command = [sys.executable, "-c", ROUND, *sizes, str(tmp_path)]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        said = json.loads(ran.stdout.splitlines()[-1])
        event = GaussianDpEvent(2.0)
        expected = {
            "DifferentialPrivacy": PoissonSampledDpEvent(BATCH / RECORDS, event),
            "ClientPrivacy": event,
        }
        assert said.keys() == expected.keys()
        for kind, each in expected.items():
            accountant = PLDAccountant()
            accountant.compose(SelfComposedDpEvent(each, number * STEPS))
            assert said[kind] == pytest.approx(accountant.get_epsilon(1e-3), rel=0.02), kind
