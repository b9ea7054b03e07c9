"""Positions and shuffles under gloo: one pair of processes trains with both, one after another."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.defenses.test_positions import IMAGES, LABELS
from tests.defenses.test_shuffle import net, seeded
from vitguard.defenses.positions import FixedPositions, sincos_positions
from vitguard.defenses.shuffle import PatchShuffle
from vitguard.guard import protect
from vitguard.models import AprilViT


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    method = f"file://{folder}/group"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=2)
    torch.save((_positions(rank, folder), *_shuffle(rank)), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def _positions(rank, folder):
    model = torch.load(f"{folder}/model.pt", weights_only=False)
    protect(model, [FixedPositions("sincos")])
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for _ in range(2):
        loss = torch.nn.functional.cross_entropy(wrapped(IMAGES[rank : rank + 1]), LABELS[:1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return wrapped.state_dict()


def _shuffle(rank):
    torch.manual_seed(0)
    model = net(depth=1)
    guard = protect(model, [PatchShuffle(0.5, dal="tokens")], generator=seeded(rank))
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    images = torch.rand(3, 3, 16, 16, generator=seeded(5 + rank))
    (wrapped(images).square().sum() + guard.auxiliary_loss()).backward()
    optimizer.step()
    return model.state_dict(), guard.truth()["source"]


@pytest.mark.slow
def test_two_processes_average_all_but_positions_and_draw_their_own_shuffles(tmp_path):
    model = AprilViT(16, 4, 96, 1, 4, 10)
    torch.save(model, tmp_path / "model.pt")
    torch.multiprocessing.spawn(_work, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=False) for r in (0, 1)]
    want = sincos_positions((4, 4), 96).float()
    for state, *_ in ranks:
        assert torch.equal(state["module.pos_embed"][0], want)
        assert not torch.equal(state["module.head.bias"], model.head.bias)
    assert torch.equal(ranks[0][0]["module.head.bias"], ranks[1][0]["module.head.bias"])
    (_, one, mine), (_, other, yours) = ranks
    assert not torch.equal(mine, yours)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    start = net(depth=1)
    moved = one["vitguard.shuffle.unknown"] - start.pos_embed[:, 1:].mean(1)
    assert moved.abs().max() > 0
