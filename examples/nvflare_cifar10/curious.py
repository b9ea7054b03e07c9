"""A filter of the server that keeps each incoming result, as an honest-but-curious server can."""

from __future__ import annotations

import torch
from model import tiny_vit
from nvflare.apis.dxo import from_shareable
from nvflare.apis.filter import Filter
from nvflare.apis.fl_constant import FLMetaKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.utils import fobs

from vitguard.federated.curious import Recording, update_of


class Record(Filter):
    """Writes the first round's results into a folder and passes them on as they are.

    Args:
        folder: Where to.
        rate: Learning rate that clients were told.
    """

    def __init__(self, folder: str, rate: float) -> None:
        super().__init__()
        self.folder, self.rate = folder, rate
        fobs.register(TensorDecomposer)

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Keep a result."""
        dxo = from_shareable(shareable)
        arrived = {
            n: v if isinstance(v, bytes) else torch.as_tensor(v) for n, v in dxo.data.items()
        }
        site = fl_ctx.get_peer_context().get_identity_name()
        before = tiny_vit().state_dict()  # public, and all that is known of a secret model
        update = update_of(
            arrived, before, learning_rate=self.rate,
            batch_size=int(dxo.get_meta_prop(FLMetaKey.NUM_STEPS_CURRENT_ROUND)),
        )  # fmt: skip
        Recording(self.folder, run=fl_ctx.get_job_id()).keep(0, site, update, before)
        return shareable
