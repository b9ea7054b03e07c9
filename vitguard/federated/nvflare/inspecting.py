"""The client's filter that looks at the weights of a task, before the training gets them."""

# pyright: reportMissingImports=false
# nvflare and flwr need not be installed together
from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from nvflare.apis.dxo import DataKind
from nvflare.apis.filter import Filter
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.utils import fobs
from torch import nn

from vitguard.errors import Incompatible, InputError, Rejected, SuspiciousWeights, expected
from vitguard.federated.nvflare.messages import require_train, sole_dxo, tensors_of
from vitguard.federated.nvflare.models import build_model
from vitguard.federated.nvflare.state import private_bytes, site_of, state_folder
from vitguard.files import parsed_json, write_atomically
from vitguard.inspection import Memory, inspect_weights, load_exactly, weights_of
from vitguard.vit import Anatomy

__all__ = ["InspectFilter"]


class InspectFilter(Filter):
    """Refuses a task whose weights have signs of a known craft.

    A client filter of incoming tasks, after `OpenFilter` where there is one. It sees the weights
    alone: the signs of the gradient are seen by a client that trains under `InspectWeights`.

    Args:
        model: `{"path": "package.Class", "args": {...}}`, of a Vision Transformer.
        limit: Factor on the limits of all signs, above 0.
        task: The one task that is let through.

    Raises:
        SuspiciousWeights, Unprotected, InputError: Whatever is not let through; NVFlare then sends
            an error reply.
    """

    def __init__(self, model: dict | nn.Module, limit: float = 1.0, task: str = "train") -> None:
        super().__init__()
        if not limit > 0:
            raise expected("limit above 0", limit)
        self.model, self.limit, self.task = model, limit, task
        self._built: nn.Module | None = None
        fobs.register(TensorDecomposer)

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Return the task as it came, or raise."""
        require_train(fl_ctx, self.task)
        given = tensors_of(sole_dxo(shareable, DataKind.WEIGHTS))
        if not math.isfinite(self.limit):
            return shareable
        if self._built is None:
            self._built = build_model(self.model)
        load_exactly(self._built, given)
        weights, anatomy = weights_of(self._built), Anatomy.of(self._built)
        if not anatomy.blocks:
            raise Incompatible("Expected a model whose blocks are known, got one without.")
        file, memory = self._file(fl_ctx), Memory()
        if file.exists():
            try:
                memory.load_state_dict(parsed_json(private_bytes(file)))
            except (InputError, ValueError) as error:
                raise Rejected(
                    "state", f"{file} ({error})", "what an earlier round left"
                ) from error
        found = inspect_weights(weights, anatomy, memory, limit=self.limit)
        if found.suspicious:
            raise SuspiciousWeights(
                f"Expected weights without signs of a craft, got {found.reason}. Nothing was "
                "computed with them; leave the round out, and ask who runs the server.",
                found,
            )
        memory.accept(memory.traces(weights, anatomy))
        write_atomically(file, json.dumps(memory.state_dict()), private=True)
        return shareable

    def _file(self, fl_ctx: FLContext) -> Path:
        workspace: Any = fl_ctx.get_workspace()
        folder = state_folder(workspace.get_run_dir(fl_ctx.get_job_id()))
        return folder / f"{site_of(fl_ctx)}-accepted.json"
