"""The recipe: NVFlare's FedAvg with every update sealed."""

# pyright: reportMissingImports=false
# nvflare and flwr need not be installed together
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nvflare.apis.dxo import DataKind
from nvflare.apis.filter import Filter
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.client.config import ExchangeFormat, TransferType

from vitguard.defenses.encryption import Manifest
from vitguard.errors import Incompatible, expected
from vitguard.federated.nvflare.client import OpenFilter, SealFilter
from vitguard.federated.nvflare.inspecting import InspectFilter
from vitguard.federated.nvflare.server import EncryptedAggregator, ResumedFedAvg, SumPersistor

__all__ = ["encrypted_fedavg"]

_TASK = "train"


def encrypted_fedavg(
    *,
    manifest: Manifest,
    model: dict[str, Any],
    client_keys: str,
    server_keys: str,
    signing: str,
    min_clients: int,
    train_script: str,
    client_passphrase: str = "VITGUARD_PASSPHRASE",
    server_passphrase: str = "VITGUARD_SERVER_PASSPHRASE",
    defenses: str = "",
    outliers: str = "refuse",
    max_clipped: int | None = None,
    initial: str = "",
    keep: int = 1,
    inspect: bool = False,
    clients: int | None = None,
    round_timeout: int = 0,
    client_filters: Sequence[Filter] = (),
    **others: Any,
) -> FedAvgRecipe:
    """Return a `FedAvgRecipe` whose clients send ciphertext, and whose server reads none of it.

    Args:
        manifest: What is encrypted: all tensors that change.
        model: `{"path": "package.Class", "args": {...}}`; plain JSON.
        client_keys: Path of the key files, the same at all sites; `{site}` stands for the name.
        server_keys, signing: Paths of the server's two key files.
        min_clients: The fewest clients of a sum, at least 2; with fewer the job ends with an error.
        train_script: NVFlare's client script; it sends `FLModel` with
            `meta={"NUM_STEPS_CURRENT_ROUND": weight}`.
        client_passphrase, server_passphrase: Names of environment variables.
        defenses: Spec of update defenses that act before the encryption.
        outliers: `refuse` or `clip`, of values beyond their bound.
        max_clipped: The most clipped values of a message that the server takes; None for any.
        initial: Path of a safetensors file with the initial weights, on the server.
        keep: Sums that are sent, for clients that sat out up to `keep - 1` rounds.
        inspect: Whether clients refuse weights with signs of a known craft (`InspectFilter`).
        clients: How many are asked in a round, `min_clients` by default. With more than that, one
            that answers with an error or too late is left out.
        round_timeout: Seconds that clients have for a round, 0 for no end: NVFlare then waits for
            one that died.
        client_filters: Job filters of results that act before vitguard's, which must be the last.
        others: Further arguments of `FedAvgRecipe`.

    Raises:
        InputError: An argument that cannot work on ciphertext.
        Incompatible: A release of NVFlare before 2.9.
    """
    for name in ("_create_controller", "_prepare_client_apps"):
        if not hasattr(FedAvgRecipe, name):
            raise Incompatible(
                "Expected nvflare 2.9 or later, got a release whose recipe cannot be told which "
                "controller and which tasks to run: clients would answer other tasks in the clear. "
                'Run pip install -U "vitguard[nvflare]".'
            )
    if type(min_clients) is not int or min_clients < 2:
        raise expected("min_clients of at least 2", repr(min_clients))
    asked = min_clients if clients is None else clients
    if type(asked) is not int or asked < min_clients:
        raise expected(f"clients, a whole number from min_clients={min_clients}", repr(asked)[:80])
    if type(round_timeout) is not int or round_timeout < 0:
        raise expected("round_timeout in whole seconds, 0 for none", repr(round_timeout)[:80])
    if max_clipped is not None and (type(max_clipped) is not int or max_clipped < 0):
        raise expected("max_clipped, a whole number of values, or None", repr(max_clipped)[:80])
    if taken := sorted(others.keys() & _OWN.keys()):
        raise expected(f"a recipe without {taken[0]}", "one with it", _OWN[taken[0]])
    agreed = manifest.to_json()
    recipe = _SealedRecipe(
        asked,
        round_timeout,
        model=None,
        min_clients=min_clients,
        train_script=train_script,
        aggregator=EncryptedAggregator(
            agreed, server_keys, signing, server_passphrase, min_clients, max_clipped
        ),
        aggregator_data_kind=DataKind.WEIGHT_DIFF,
        model_persistor=SumPersistor(agreed, model, initial, keep),
        server_expected_format=ExchangeFormat.PYTORCH,
        params_transfer_type=TransferType.DIFF,
        **others,
    )
    for each in client_filters:
        recipe.add_client_output_filter(each, tasks=[_TASK])
    recipe.add_client_input_filter(
        OpenFilter(agreed, client_keys, client_passphrase, min_clients), tasks=[_TASK]
    )
    if inspect:
        recipe.add_client_input_filter(InspectFilter(model), tasks=[_TASK])
    seal = SealFilter(
        agreed, client_keys, client_passphrase, defenses, model if defenses else None, outliers
    )
    recipe.add_client_output_filter(seal, tasks=[_TASK])
    recipe.closed = True
    return recipe


_CIPHERTEXT = "The server adds ciphertext, and reads neither weights nor what it adds."
_OWN: dict[str, str] = dict.fromkeys(
    (
        "aggregator", "aggregator_data_kind", "aggregation_weights", "exclude_vars", "initial_ckpt",
        "model_locator", "model_persistor", "params_transfer_type", "server_expected_format",
        "stop_cond", "patience", "per_site_config", "enable_tensor_disk_offload",
    ),
    _CIPHERTEXT,
)  # fmt: skip


class _SealedRecipe(FedAvgRecipe):
    """A recipe that takes no filter after the encryption, and whose clients run one task alone."""

    closed = False

    def __init__(self, asked: int, round_timeout: int, **settings: Any) -> None:
        self._asked, self._round_timeout = asked, round_timeout  # NVFlare's own init needs them
        super().__init__(**settings)

    def add_client_output_filter(self, filter: Filter, tasks: Any = None, clients: Any = None):
        """Add a filter of results, until the encryption is there.

        Raises:
            InputError: The encryption is there: a filter after it would see ciphertext.
        """
        if self.closed:
            raise expected(
                "the encryption as the last client filter", f"{type(filter).__name__} after it",
                "Give it to encrypted_fedavg as client_filters=[...].",
            )  # fmt: skip
        return super().add_client_output_filter(filter, tasks, clients)

    def _prepare_client_apps(self) -> None:
        # NVFlare runs filters for the tasks they name alone, and "*" names none: a script that
        # answers any other task would answer it in the clear
        self._job.to_clients(self._create_client_runner({}), tasks=[_TASK])

    def _create_controller(
        self, persistor_id: str, model_params: Any, model_aggregator: Any
    ) -> ResumedFedAvg:
        # what else NVFlare's own gives its controller cannot work on ciphertext, see `_OWN`
        return ResumedFedAvg(
            num_clients=self._asked,
            round_timeout=self._round_timeout,
            num_rounds=self.num_rounds,
            persistor_id=persistor_id,
            model=model_params,
            aggregator=model_aggregator,
            task_name=_TASK,
            memory_gc_rounds=self.server_memory_gc_rounds,
            **self._get_controller_kwargs(),
        )
