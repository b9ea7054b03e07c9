"""The client's filters: open what the server sends, seal what leaves."""

# pyright: reportMissingImports=false
# nvflare and flwr need not be installed together
from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.filter import Filter
from nvflare.apis.fl_constant import FLMetaKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.fl_model import MetaKey
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.utils import fobs
from torch import Tensor, nn

from vitguard.core import Update
from vitguard.defenses.base import UpdateDefense
from vitguard.defenses.encryption import Decryptor, Encryptor, KeySet, Manifest
from vitguard.errors import Rejected, Unprotected, expected
from vitguard.federated.nvflare.messages import (
    CLIPPED,
    MESSAGE,
    bare,
    failed,
    metrics_of,
    refuse_tensors,
    require_train,
    round_of,
    sole_dxo,
    sums_in,
    tensors_of,
    weight_of,
)
from vitguard.federated.nvflare.models import build_model
from vitguard.federated.nvflare.state import (
    ClientState,
    initial_version,
    passphrase_of,
    site_of,
    state_folder,
)
from vitguard.federated.schemes import sealing_of
from vitguard.federated.weights import images_behind
from vitguard.guard import Guard, protect
from vitguard.registry import parse_stack
from vitguard.rounds import Progress, next_version

__all__ = ["OpenFilter", "SealFilter"]


class _ClientFilter(Filter):
    """What both filters share: names of files and variables in the job, never a key."""

    manifest: str
    keys: str
    passphrase: str
    task: str

    def _agreed(self) -> Manifest:
        return Manifest.from_json(self.manifest)

    def _keys(self, fl_ctx: FLContext) -> KeySet:
        site = site_of(fl_ctx)
        return KeySet.load(self.keys.replace("{site}", site), passphrase_of(self.passphrase))

    def _state_file(self, fl_ctx: FLContext) -> Path:
        workspace: Any = fl_ctx.get_workspace()
        run = workspace.get_run_dir(fl_ctx.get_job_id())
        return state_folder(run) / f"{site_of(fl_ctx)}.safetensors"


class OpenFilter(_ClientFilter):
    """Opens the encrypted sum that the server sends, and gives the training plain weights.

    The first task of a run brings the public initial model; every later one must bring sums. The
    first client filter of incoming tasks, for all tasks.

    Args:
        manifest: `Manifest.to_json()`.
        keys: Path of this site's key file (`KeySet.for_client`); `{site}` stands for its name.
        passphrase: Name of the environment variable that holds the passphrase.
        min_clients: The fewest clients of a sum that is opened, at least 2.
        task: The one task that is let through.

    Raises:
        Rejected, Unprotected: Whatever is not known; NVFlare then sends an error reply.
    """

    def __init__(
        self,
        manifest: str,
        keys: str,
        passphrase: str = "VITGUARD_PASSPHRASE",
        min_clients: int = 2,
        task: str = "train",
    ) -> None:
        super().__init__()
        self.manifest, self.keys, self.passphrase = manifest, keys, passphrase
        self.min_clients, self.task = min_clients, task
        fobs.register(TensorDecomposer)

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Return the task with plain weights in place of sums."""
        require_train(fl_ctx, self.task)
        dxo = sole_dxo(shareable, DataKind.WEIGHTS)
        number, manifest = round_of(shareable), self._agreed()
        file = self._state_file(fl_ctx)
        state = ClientState.read(file, manifest.digest().hex())
        if number < state.training:
            raise Rejected("replay", f"a task of round {number} after round {state.training}")
        sums = sums_in(dxo)
        if sums is None:
            self._begin(state, tensors_of(dxo), manifest, fl_ctx)
        else:
            self._advance(state, sums, number, manifest, fl_ctx)
        state.training = number
        state.write(file)
        plain = DXO(DataKind.WEIGHTS, data={n: t.clone() for n, t in state.weights.items()})
        return plain.update_shareable(shareable)

    def _begin(
        self,
        state: ClientState,
        weights: dict[str, Tensor],
        manifest: Manifest,
        fl_ctx: FLContext,
    ) -> None:
        """Take the initial model, once; the same again where a task is sent again."""
        manifest.check(weights)
        refuse_tensors(weights)
        base = initial_version(weights, fl_ctx)
        if state.progress.opened >= 0 or state.progress.base not in ("", base):
            raise Rejected("base", "a plain model in the middle of a run", "an encrypted sum")
        state.progress, state.weights = Progress(-1, base), weights

    def _advance(
        self,
        state: ClientState,
        sums: dict[int, bytes],
        number: int,
        manifest: Manifest,
        fl_ctx: FLContext,
    ) -> None:
        """Open the sums that this client has not opened yet, oldest first."""
        if not state.progress.base:
            raise Rejected("base", "a sum before the initial model: the state of this run is lost")
        if max(sums) >= number:
            raise Rejected("round", f"the sum of round {max(sums)} in a task of round {number}")
        last = state.progress.opened
        missed = {r: total for r, total in sums.items() if r > last}
        if not missed:
            newest = hashlib.sha256(sums[max(sums)]).hexdigest()
            if max(sums) != last or newest != state.total:
                raise Rejected("replay", f"an old sum after round {last} was opened")
            return
        decryptor = Decryptor(
            self._keys(fl_ctx), manifest, min_clients=self.min_clients, opened=last
        )
        file = self._state_file(fl_ctx)
        for opened, total in missed.items():
            base = state.progress.base
            # marked on the disk first: a crash from here on leaves a round that is never opened
            replace(state, progress=state.progress.after(opened, base), total="").write(file)
            try:
                mean = decryptor.decrypt(total, round_id=opened, base=base)
            except Rejected:
                if decryptor.opened < opened:  # not the server's: it uses no round up
                    state.write(file)
                raise
            state.progress = state.progress.after(opened, next_version(base, total))
            state.total = hashlib.sha256(total).hexdigest()
            state.weights |= {
                name: state.weights[name] + change.to(state.weights[name])
                for name, change in mean.items()
            }
            refuse_tensors(state.weights)
            state.write(file)


class SealFilter(_ClientFilter):
    """Seals the weight difference that leaves: update defenses first, encryption last.

    The last client filter of outgoing results, for all tasks. Without `keys` nothing is encrypted
    and only `defenses` act, under any strategy that takes weight differences.

    Args:
        manifest: `Manifest.to_json()`; with `keys`.
        keys: Path of this site's key file; `{site}` stands for its name.
        passphrase: Name of the environment variable that holds the passphrase.
        defenses: Spec of further defenses of the update, such as `noise` or `client-privacy`.
            Others act in the training, which a filter does not see: they are refused. A
            `batch-floor` takes the site's weight for the images behind the update: state their
            number, not steps or images times epochs.
        model: `{"path": "package.Class", "args": {...}}`, for `defenses`.
        outliers: `refuse` or `clip` values beyond their bound, as `Encryptor` does. The server is
            told how many were clipped.
        task: The one task that is let through.

    Raises:
        Rejected, Unprotected: Whatever is not known; NVFlare then sends an error reply.
    """

    def __init__(
        self,
        manifest: str = "",
        keys: str = "",
        passphrase: str = "VITGUARD_PASSPHRASE",
        defenses: str = "",
        model: dict | nn.Module | None = None,
        outliers: str = "refuse",
        task: str = "train",
    ) -> None:
        super().__init__()
        stack = parse_stack(defenses) if defenses else []
        if not keys and not stack:
            raise Unprotected("Expected keys or defenses, got neither: nothing would be sealed.")
        if outliers not in ("refuse", "clip"):
            raise expected("outliers 'refuse' or 'clip'", repr(outliers)[:80])
        if outliers == "clip" and not keys:
            raise expected(
                "outliers='clip' with keys, whose manifest has the bounds", "it without",
                "Nothing would be clipped: leave it out.",
            )  # fmt: skip
        if bool(keys) != bool(manifest):
            raise Unprotected("Expected keys and manifest together, got one of them.")
        if defenses and model is None:
            raise Unprotected("Expected the model's path and args beside defenses, got none.")
        for defense in stack:
            if sealing_of([defense]) is not None:
                raise Unprotected(
                    f"Expected {defense.name} by keys and manifest, got it among the defenses, "
                    "where it has none. Give keys= and manifest=; masks are for Flower."
                )
            if not isinstance(defense, UpdateDefense):
                raise Unprotected(
                    f"Expected defenses of the update, such as noise, got {defense.name}: the "
                    "training happens elsewhere, where a filter changes nothing. Protect the "
                    "model in the client's own code."
                )
            if defense.feeds_back():
                raise Unprotected(
                    f"Expected {defense.name} without feedback, got it with: what it cuts from "
                    "updates is secret, and a site's state is no place for it. Leave feedback out."
                )
        self.manifest, self.keys, self.passphrase = manifest, keys, passphrase
        self.defenses, self.model = defenses, model
        self.outliers, self.task = outliers, task
        self._guard: Guard | None = None
        fobs.register(TensorDecomposer)

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Return a new message that holds what was sealed, and numbers."""
        require_train(fl_ctx, self.task)
        error = failed(shareable)
        if error is not None:
            return error
        dxo = sole_dxo(shareable, DataKind.WEIGHT_DIFF)
        tensors, weight, metrics = tensors_of(dxo), weight_of(dxo), metrics_of(dxo)
        file = self._state_file(fl_ctx)
        run = self._agreed().digest().hex() if self.keys else ""
        state = ClientState.read(file, run)
        if self.defenses:
            tensors = self._defended(tensors, weight, state, file)
        meta: dict[str, Any] = {FLMetaKey.NUM_STEPS_CURRENT_ROUND: weight}
        if metrics:
            meta[MetaKey.INITIAL_METRICS] = metrics
        data: dict[str, Any] = tensors
        if self.keys:
            number = shareable.get_header(AppConstants.CURRENT_ROUND, state.training)
            if state.training < 0:
                raise Unprotected(
                    "Expected a result of a task that was opened, got one before the first. Make "
                    "OpenFilter the first client filter of incoming tasks."
                )
            if number != state.training:
                raise Rejected("round", f"a result of round {number}", f"one of {state.training}")
            message, meta[CLIPPED] = self._encrypted(tensors, weight, state, fl_ctx)
            data = {MESSAGE: message}
        else:
            refuse_tensors(tensors)
        sealed = DXO(DataKind.WEIGHT_DIFF, data=data, meta=meta)
        return sealed.update_shareable(bare(shareable))

    def _encrypted(
        self, tensors: dict[str, Tensor], weight: float, state: ClientState, fl_ctx: FLContext
    ) -> tuple[bytes, int]:
        """Return the message, and how many values were moved to their bound."""
        manifest = self._agreed()
        fractions = {n for n, t in tensors.items() if t.is_floating_point() or t.is_complex()}
        fractions |= {*manifest.names}
        tensors = {n: t for n, t in tensors.items() if n in fractions}  # no counters
        for name in tensors.keys() - set(manifest.names):
            still = name in state.weights and not bool(tensors[name].any())
            if not still:
                raise Unprotected(
                    f"Expected tensors of the manifest alone, got a change of {name}. It would "
                    "be lost: freeze it, or make the manifest with it."
                )
        encryptor = Encryptor(
            self._keys(fl_ctx),
            manifest,
            client_id=site_of(fl_ctx),
            outliers=self.outliers,  # type: ignore[arg-type]
        )
        message = encryptor.encrypt(
            tensors, round_id=state.training, weight=weight, base=state.progress.base
        )
        return message, sum(encryptor.clipped.values())

    def _defended(
        self, tensors: dict[str, Tensor], weight: float, state: ClientState, file: Path
    ) -> dict[str, Tensor]:
        """Return the difference after the update defenses; what it spent is on the disk first."""
        if self._guard is None:
            assert self.model is not None
            self._guard = protect(build_model(self.model), self.defenses)
        guard = self._guard
        if state.guard:
            guard.load_state_bytes(state.guard.encode())
        images = images_behind(weight)
        try:
            update = guard.seal(Update(tensors, kind="difference", batch_size=images))
        finally:  # a release that was counted stays counted, whatever a later defense refuses
            state.guard = guard.state_bytes(draws=False).decode()
            state.write(file)
        if hidden := [n for n in update.sealed if tensors[n].is_floating_point()]:
            raise Unprotected(f"Expected a difference that is readable, got {hidden[0]} sealed.")
        return dict(update.tensors)
