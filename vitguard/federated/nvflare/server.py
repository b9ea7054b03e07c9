"""The server's side: add what cannot be read, and keep the sums for the clients."""

# pyright: reportMissingImports=false
# nvflare and flwr need not be installed together
from __future__ import annotations

from pathlib import Path
from typing import Any

from nvflare.apis.dxo import DataKind
from nvflare.apis.fl_constant import FLMetaKey
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.abstract.model import (
    ModelLearnable,
    ModelLearnableKey,
    make_model_learnable,
)
from nvflare.app_common.abstract.model_persistor import ModelPersistor
from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.workflows.fedavg import FedAvg
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.utils import fobs
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from vitguard.defenses.encryption import Aggregator, Manifest, ServerKeys, SigningKey
from vitguard.errors import Rejected, expected
from vitguard.federated.nvflare.messages import CLIPPED, MESSAGE, SUM, refuse_tensors, sum_name
from vitguard.federated.nvflare.models import build_model
from vitguard.federated.nvflare.state import (
    ServerState,
    initial_version,
    passphrase_of,
    private_bytes,
    state_folder,
)
from vitguard.files import write_atomically
from vitguard.rounds import next_version

__all__ = ["EncryptedAggregator", "ResumedFedAvg", "SumPersistor"]


def _folder(fl_ctx: FLContext) -> Path:
    workspace: Any = fl_ctx.get_workspace()
    return state_folder(workspace.get_run_dir(fl_ctx.get_job_id()))


def _state_file(fl_ctx: FLContext) -> Path:
    return _folder(fl_ctx) / "server.json"


class EncryptedAggregator(ModelAggregator):
    """Adds the clients' sealed messages; a message that is refused leaves the sum as it was.

    Refused one by one, each with its reason in the log: whatever is not one sealed message, of
    this round and of the model as it stands, from the client that NVFlare says it is from, with
    the weight that NVFlare's log shows.

    Args:
        manifest: `Manifest.to_json()`.
        keys: Path of the server's key file (`KeySet.for_server`).
        signing: Path of the server's `SigningKey`.
        passphrase: Name of the environment variable that holds the passphrase of both.
        min_clients: The fewest messages of a sum; with fewer the job ends with an error.
        max_clipped: The most values of a message that were moved to their bound; None for any.
    """

    expected_data_kind = DataKind.WEIGHT_DIFF

    def __init__(
        self,
        manifest: str,
        keys: str,
        signing: str,
        passphrase: str = "VITGUARD_SERVER_PASSPHRASE",
        min_clients: int = 2,
        max_clipped: int | None = None,
    ) -> None:
        super().__init__()
        self.manifest, self.keys, self.signing = manifest, keys, signing
        self.passphrase, self.min_clients = passphrase, min_clients
        self.max_clipped = max_clipped
        self.refused: dict[str, str] = {}
        self._held: tuple[ServerKeys, SigningKey] | None = None
        self._sum: Aggregator | None = None
        self._round = -1

    def reset_stats(self) -> None:
        """Begin a round: its number, and the version of the model that clients hold."""
        context = self._context()
        number = context.get_prop(AppConstants.CURRENT_ROUND)
        if type(number) is not int:
            raise expected("the number of the round in NVFlare's context", repr(number))
        manifest = Manifest.from_json(self.manifest)
        state = ServerState.read(_state_file(context), manifest.digest().hex())
        if state is None:
            raise expected("the state that SumPersistor writes", "none", "Use both together.")
        keys, signing = self._keys()
        self.refused = {}
        self._sum = Aggregator(keys, manifest, signing=signing, round_id=number, base=state.base)
        self._round = number

    def accept_model(self, model: FLModel) -> None:
        """Add one client's message.

        Raises:
            Rejected: It does not hold; NVFlare logs it, and goes on without this client.
        """
        client = str((model.meta or {}).get("client_name", ""))
        try:
            weight = (model.meta or {}).get(FLMetaKey.NUM_STEPS_CURRENT_ROUND)
            if type(weight) not in (int, float):
                raise Rejected("weight", f"a weight of {weight!r:.80}", "that of the message")
            clipped, most = (model.meta or {}).get(CLIPPED, 0), self.max_clipped
            if most is not None and not (type(clipped) is int and 0 <= clipped <= most):
                raise Rejected("clipped", f"{clipped!r:.80} values beyond bounds", "fewer")
            self._open_sum().add(_message(model), sender=client, weight=weight)
        except Rejected as refusal:
            self.refused[client] = str(refusal)
            self.warning(f"Refused the result of {client or 'an unnamed client'}: {refusal}")
            raise

    def aggregate_model(self) -> FLModel:
        """Return the encrypted sum of the round.

        Raises:
            Rejected: Fewer than `min_clients` messages held.
        """
        total = self._open_sum().finish(min_clients=self.min_clients)
        self._sum = None
        return FLModel(
            params={sum_name(self._round): total},
            params_type=ParamsType.FULL,
            current_round=self._round,
        )

    def _open_sum(self) -> Aggregator:
        if self._sum is None:
            raise Rejected("round", "a result outside a round", "a round that has begun")
        return self._sum

    def _context(self) -> FLContext:
        context: FLContext | None = self.fl_ctx
        if context is None:
            raise expected("NVFlare's context, from the start of the run", "none")
        return context

    def _keys(self) -> tuple[ServerKeys, SigningKey]:
        if self._held is None:  # scrypt takes a second: once for a process
            phrase = passphrase_of(self.passphrase)
            self._held = ServerKeys.load(self.keys, phrase), SigningKey.load(self.signing, phrase)
        return self._held


def _message(model: FLModel) -> bytes:
    params = model.params
    if not isinstance(params, dict) or list(params) != [MESSAGE]:
        raise Rejected("type", "a result that is not sealed")
    message = params[MESSAGE]
    if not isinstance(message, bytes):
        raise Rejected("type", f"{type(message).__name__} where bytes were due")
    return message


class SumPersistor(ModelPersistor):
    """Keeps the encrypted sums in place of a model, which the server cannot read.

    The initial model is public. What clients hold later, only they can save.

    Args:
        manifest: `Manifest.to_json()`.
        model: `{"path": "package.Class", "args": {...}}` of the initial model.
        initial: Path of a safetensors file with its weights; without one the model draws them.
        keep: Sums that are sent, for clients that sat out up to `keep - 1` rounds.
    """

    def __init__(
        self, manifest: str, model: dict | nn.Module, initial: str = "", keep: int = 1
    ) -> None:
        super().__init__()
        if type(keep) is not int or keep < 1:
            raise expected("a whole number of sums to keep, at least 1", repr(keep))
        self.manifest, self.model, self.initial, self.keep = manifest, model, initial, keep
        fobs.register(TensorDecomposer)

    def load_model(self, fl_ctx: FLContext) -> ModelLearnable:
        """Return the initial model, or after a restart the sums that were kept.

        The initial model is kept as well: sites may hold it when the server starts again.
        """
        run = Manifest.from_json(self.manifest).digest().hex()
        state = ServerState.read(_state_file(fl_ctx), run)
        if state is not None and state.rounds:
            return make_model_learnable(self._kept(state, fl_ctx), {})
        file = _folder(fl_ctx) / "initial.safetensors"
        if state is not None and file.exists():
            try:
                weights = load(private_bytes(file))
            except SafetensorError as error:
                raise Rejected("state", f"{file}, which is damaged", "its weights") from error
            if initial_version(weights, fl_ctx) != state.base:
                raise Rejected("state", f"another initial model in {file}", "that of this run")
            return make_model_learnable(weights, {})
        weights = self._initial()
        Manifest.from_json(self.manifest).check(weights)
        refuse_tensors(weights)
        whole = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
        write_atomically(file, save(whole), private=True)
        ServerState(run, initial_version(weights, fl_ctx)).write(_state_file(fl_ctx))
        return make_model_learnable(weights, {})

    def save_model(self, model: ModelLearnable, fl_ctx: FLContext) -> None:
        """Keep the sum of a round, and move on to the next version of the model.

        Raises:
            Rejected: It is no sum, or of a round that was kept already.
        """
        state = self._state(fl_ctx)
        weights = model[ModelLearnableKey.WEIGHTS]
        sums = {n: v for n, v in weights.items() if n not in map(sum_name, state.rounds)}
        number = _number(sums)
        if state.rounds and number <= state.rounds[-1]:
            raise Rejected("replay", f"the sum of round {number} after {state.rounds[-1]}")
        total = sums[sum_name(number)]
        write_atomically(_sum_file(fl_ctx, number), total, private=True)
        dropped = state.rounds[: max(0, len(state.rounds) + 1 - self.keep)]
        state.rounds = [*state.rounds[len(dropped) :], number]
        state.base = next_version(state.base, total)
        state.write(_state_file(fl_ctx))
        for old in dropped:
            _sum_file(fl_ctx, old).unlink(missing_ok=True)
        # what the next task sends: NVFlare passes this same mapping on
        kept = self._kept(state, fl_ctx)
        weights.clear()
        weights.update(kept)

    def _state(self, fl_ctx: FLContext) -> ServerState:
        run = Manifest.from_json(self.manifest).digest().hex()
        state = ServerState.read(_state_file(fl_ctx), run)
        if state is None:
            raise Rejected("state", "a sum before the initial model", "the state of a server")
        return state

    def _kept(self, state: ServerState, fl_ctx: FLContext) -> dict[str, bytes]:
        return {sum_name(r): private_bytes(_sum_file(fl_ctx, r)) for r in state.rounds}

    def _initial(self) -> dict[str, Any]:
        if self.initial:
            from safetensors.torch import load_file

            return load_file(self.initial)
        state = build_model(self.model).state_dict()
        return {name: tensor.detach().clone() for name, tensor in state.items()}


class ResumedFedAvg(FedAvg):
    """NVFlare's FedAvg; after a restart it goes on with the round after the last sum that was kept.

    Rounds are numbered from 0 to `num_rounds`, over all restarts together. A site that answers
    with an error, or not in time, is left out of the round; with too few others the aggregator ends
    the job.

    Args:
        round_timeout: Seconds that sites have for a round, 0 for no end.
        args, kwargs: Of NVFlare's `FedAvg`.
    """

    def __init__(self, *args: Any, round_timeout: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **{"ignore_result_error": True, **kwargs})
        self.round_timeout = round_timeout

    def send_model(self, *args: Any, **settings: Any) -> None:
        """Send the task of a round, as NVFlare does, with the time that sites have."""
        super().send_model(*args, **{"timeout": self.round_timeout, **settings})

    def load_model(self) -> FLModel | None:
        """Return the initial model, or the sums; the next round is the one after them."""
        model = super().load_model()
        params = model.params if model is not None else None
        kept = [n for n in params or () if isinstance(n, str) and n.startswith(SUM)]
        if kept:
            following = max(int(n.removeprefix(SUM)) for n in kept) + 1
            self.num_rounds = max(0, self.start_round + self.num_rounds - following)
            self.start_round = following
        return model


def _sum_file(fl_ctx: FLContext, number: int) -> Path:
    return _folder(fl_ctx) / f"sum-{number}.bin"


def _number(sums: dict[str, Any]) -> int:
    """Return the round of the one new sum."""
    for name, value in sums.items():
        tail = name.rpartition(".")[2]
        sole = len(sums) == 1 and tail.isdigit() and name == sum_name(int(tail))
        if sole and isinstance(value, bytes):
            return int(tail)
    raise Rejected("type", "an aggregate that is not one encrypted sum", "one encrypted sum")
