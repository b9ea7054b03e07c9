"""NVFlare's own message types, and everything that a client or server must refuse of them."""

from __future__ import annotations

import errno
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn

pytest.importorskip("nvflare", reason="needs the extra nvflare", exc_type=ImportError)

from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_constant import FLContextKey, FLMetaKey, ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.abstract.model import make_model_learnable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.app_common.workflows.fedavg import FedAvg
from nvflare.fuel.utils import fobs

from tests.conftest import small_vit
from vitguard.defenses.encryption import KeySet, Manifest, SigningKey, keyfile, worst_error
from vitguard.errors import Incompatible, InputError, Rejected, Unprotected, UpdateRefused
from vitguard.federated.nvflare import (
    EncryptedAggregator,
    OpenFilter,
    SealFilter,
    SumPersistor,
    encrypted_fedavg,
)
from vitguard.federated.nvflare import messages as parts
from vitguard.federated.nvflare.server import ResumedFedAvg
from vitguard.federated.nvflare.state import ClientState
from vitguard.rounds import Progress, next_version

SITES = ("site-1", "site-2", "site-3")
MODEL = {"path": "torch.nn.Linear", "args": {"in_features": 6, "out_features": 4}}
BOUND, HEAVIEST = 0.5, 100.0


def context(
    root: Path, name: str, task: str = "train", number: int = 0, job: str = "job"
) -> FLContext:
    """NVFlare's context, with a workspace that knows one run directory."""
    fl_ctx = FLContext()
    fl_ctx.set_prop(ReservedKey.IDENTITY_NAME, name, private=False, sticky=True)
    fl_ctx.set_prop(ReservedKey.RUN_NUM, job, private=False, sticky=True)
    fl_ctx.set_prop(FLContextKey.TASK_NAME, task, private=True, sticky=False)
    fl_ctx.set_prop(AppConstants.CURRENT_ROUND, number, private=True, sticky=False)
    workspace = SimpleNamespace(get_run_dir=lambda job: str(root / name / job))
    engine = SimpleNamespace(get_workspace=lambda: workspace, fire_event=lambda *a: None)
    fl_ctx.set_prop(ReservedKey.ENGINE, engine, private=True, sticky=True)
    return fl_ctx


@dataclass
class Run:
    """A whole run in one process: filters are made anew for every message, as after restarts."""

    root: Path
    manifest: str
    keys: KeySet

    @property
    def files(self) -> dict[str, str]:
        return {"manifest": self.manifest, "keys": str(self.root / "{site}.json")}

    def persistor(self, **more) -> SumPersistor:
        return SumPersistor(self.manifest, MODEL, **more)

    def aggregator(
        self, number: int, min_clients: int = 2, job: str = "job"
    ) -> EncryptedAggregator:
        made = EncryptedAggregator(
            self.manifest, str(self.root / "server.json"), str(self.root / "signing.json"),
            min_clients=min_clients,
        )  # fmt: skip
        made.fl_ctx = context(self.root, "server", number=number, job=job)
        made.reset_stats()
        return made

    def opened(self, site: str, number: int, params: dict) -> dict[str, torch.Tensor]:
        opened = OpenFilter(**self.files).process(
            task_of(number, params), context(self.root, site, number=number)
        )
        return from_shareable(opened).data

    def sealed(self, site: str, reply: Shareable, number: int = 0, **more) -> Shareable:
        more = {**self.files, **more}
        return SealFilter(**more).process(reply, context(self.root, site, number=number))

    def accepted(self, aggregator: EncryptedAggregator, site: str, reply: Shareable) -> None:
        """As NVFlare's controller does: the model from the message, and the sender's name."""
        model = FLModelUtils.from_shareable(fobs.loads(fobs.dumps(reply)))
        model.meta["client_name"] = site
        aggregator.accept_model(model)


@pytest.fixture
def run(tmp_path, monkeypatch) -> Run:
    monkeypatch.setenv("VITGUARD_PASSPHRASE", "of the clients")
    monkeypatch.setenv("VITGUARD_SERVER_PASSPHRASE", "of the server")
    monkeypatch.setattr(keyfile, "_COST", 1 << 4)  # passphrases are not what is tested here
    monkeypatch.setattr(keyfile, "_COSTS", (1 << 4,))
    keys, signing = shared_keys()
    signing.save(str(tmp_path / "signing.json"), "of the server")
    keys.for_server().save(str(tmp_path / "server.json"), "of the server")
    for site in SITES:
        keys.for_client(site).save(str(tmp_path / f"{site}.json"), "of the clients")
    manifest = Manifest.of(nn.Linear(6, 4).state_dict(), bounds=BOUND, max_weight=HEAVIEST)
    return Run(tmp_path, manifest.to_json(), keys)


def shared_keys() -> tuple[KeySet, SigningKey]:
    signing = SigningKey.generate()
    return KeySet.generate(max_clients=10, server=signing.public_bytes()), signing


def task_of(number: int, params: dict) -> Shareable:
    task = DXO(DataKind.WEIGHTS, data=params).to_shareable()
    task.set_header(AppConstants.CURRENT_ROUND, number)
    return task


def reply_of(tensors: dict, weight: object = 10, number: int = 0, **meta) -> Shareable:
    meta = {FLMetaKey.NUM_STEPS_CURRENT_ROUND: weight, **meta}
    if weight is None:
        del meta[FLMetaKey.NUM_STEPS_CURRENT_ROUND]
    reply = DXO(DataKind.WEIGHT_DIFF, data=tensors, meta=meta).to_shareable()
    reply.set_header(AppConstants.CURRENT_ROUND, number)
    return reply


def whole_model() -> Shareable:
    meta = {FLMetaKey.NUM_STEPS_CURRENT_ROUND: 10}
    return DXO(DataKind.WEIGHTS, data=change(), meta=meta).to_shareable()


def change(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.rand(4, 6, generator=generator) * 0.2 - 0.1,
        "bias": torch.rand(4, generator=generator) * 0.2 - 0.1,
    }


def begun(run: Run, number: int = 0) -> tuple[dict, EncryptedAggregator]:
    """Load the initial model, let all sites take it, and begin the round."""
    initial = run.persistor().load_model(context(run.root, "server"))["weights"]
    for site in SITES:
        run.opened(site, number, dict(initial))
    return initial, run.aggregator(number)


def played(run: Run, number: int, params: dict, sites=SITES, persistor=None) -> tuple[dict, dict]:
    """One round: what the server sends next, and the model that each site should then hold."""
    weights = {site: run.opened(site, number, dict(params)) for site in sites}
    aggregator = run.aggregator(number)
    total = {name: torch.zeros_like(t) for name, t in change().items()}
    for i, site in enumerate(sites):
        update, weight = change(10 * number + i), 10 * (i + 1)
        run.accepted(aggregator, site, run.sealed(site, reply_of(update, weight, number), number))
        total = {n: t + weight * update[n] for n, t in total.items()}
    sent = aggregator.aggregate_model().params
    learnable = make_model_learnable(sent, {})
    fl_ctx = context(run.root, "server", number=number)
    (persistor or run.persistor()).save_model(learnable, fl_ctx)
    of_all = sum(10 * (i + 1) for i in range(len(sites)))
    after = {n: weights[sites[0]][n] + t / of_all for n, t in total.items()}
    return learnable["weights"], after


def test_two_rounds_give_the_plain_weighted_average(run):
    params = run.persistor().load_model(context(run.root, "server"))["weights"]
    limit = worst_error(BOUND, run.keys, [10, 20, 30], max_weight=HEAVIEST) + 1e-7
    for number in range(2):
        params, after = played(run, number, params)
        for site in SITES:
            held = run.opened(site, number + 1, dict(params))
            for name, tensor in held.items():
                assert (tensor - after[name]).abs().max() <= limit


def test_no_recorded_byte_holds_a_plain_value(run):
    _, aggregator = begun(run)
    update = change()
    recorded = b""
    for site in SITES[:2]:
        sealed = run.sealed(site, reply_of(update))
        recorded += fobs.dumps(sealed)
        run.accepted(aggregator, site, sealed)
    recorded += fobs.dumps(FLModelUtils.to_shareable(aggregator.aggregate_model()))
    plain = fobs.dumps(reply_of({n: t.numpy().tobytes() for n, t in update.items()}))
    for tensor in update.values():
        whole = tensor.numpy().tobytes()
        assert whole in plain  # the search finds what is there
        for start in range(0, len(whole) - 8, 4):
            assert whole[start : start + 8] not in recorded


def test_filters_are_made_from_plain_json_and_hold_no_key(run):
    for made in (OpenFilter(**run.files), SealFilter(**run.files)):
        text = json.dumps({k: v for k, v in vars(made).items() if isinstance(v, str | int)})
        assert "of the clients" not in text


@pytest.mark.parametrize("weight", [0, -1, 1e9, float("nan"), float("inf"), None, "10", True])
def test_a_weight_that_cannot_be_is_refused_at_the_client(run, weight):
    begun(run)
    with pytest.raises((InputError, Unprotected)):
        run.sealed("site-1", reply_of(change(), weight))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9])
def test_values_that_cannot_be_are_refused_at_the_client(run, value):
    begun(run)
    update = change()
    update["weight"][1, 2] = value
    with pytest.raises(InputError):
        run.sealed("site-1", reply_of(update))


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(lambda: whole_model(), id="weights"),
        pytest.param(lambda: DXO(DataKind.METRICS, data={"a": 1}).to_shareable(), id="metrics"),
        pytest.param(lambda: Shareable(), id="no DXO"),
        pytest.param(lambda: None, id="nothing"),
        pytest.param(lambda: reply_of({}), id="empty"),
        pytest.param(
            lambda: reply_of({n: t.numpy() for n, t in change().items()}), id="NumPy arrays"
        ),
        pytest.param(lambda: reply_of({"weight": change()["weight"]}), id="a name missing"),
        pytest.param(lambda: reply_of(change() | {"other": torch.ones(2)}), id="a strange name"),
        pytest.param(lambda: reply_of(change() | {"bias": torch.ones(5)}), id="another shape"),
        pytest.param(lambda: reply_of(change(), number=3), id="another round"),
        pytest.param(
            lambda: reply_of(change(), initial_metrics={"images": torch.ones(3)}), id="metric"
        ),
    ],
)
def test_a_reply_that_is_not_known_never_leaves(run, reply):
    begun(run)
    with pytest.raises((InputError, Unprotected)):
        run.sealed("site-1", reply())


def test_content_beside_the_update_never_leaves(run):
    begun(run)
    beside = reply_of(change())
    beside["images"] = torch.ones(3)
    with pytest.raises(Unprotected, match="images"):
        run.sealed("site-1", beside)
    header = reply_of(change(), secret=torch.ones(3))
    header.set_header("images", np.ones(3))
    sealed = run.sealed("site-1", header)
    assert sealed.get_header("images") is None
    assert "secret" not in from_shareable(sealed).meta


def test_another_task_is_refused_both_ways(run):
    initial, _ = begun(run)
    fl_ctx = context(run.root, "site-1", task="submit_model")
    for act, message in (
        (OpenFilter(**run.files), task_of(0, dict(initial))),
        (SealFilter(**run.files), reply_of(change())),
    ):
        with pytest.raises(Unprotected, match="task"):
            act.process(message, fl_ctx)


def test_the_reply_of_a_failed_training_carries_nothing_else(run):
    begun(run)
    failed = make_reply(ReturnCode.EXECUTION_EXCEPTION)
    failed["images"] = torch.ones(3)
    sealed = run.sealed("site-1", failed)
    assert sealed.get_return_code() == ReturnCode.EXECUTION_EXCEPTION
    assert "images" not in sealed


@pytest.mark.parametrize("metrics", [np.ones(2), [1.0], "0.5", {"loss": "low"}, {"loss": 10**400}])
def test_metrics_that_are_no_numbers_are_refused_in_words(metrics):
    dxo = DXO(DataKind.WEIGHT_DIFF, data={"w": torch.ones(2)}, meta={"initial_metrics": metrics})
    with pytest.raises(Unprotected, match="metrics that are numbers"):
        parts.metrics_of(dxo)


def test_a_result_before_any_task_is_refused(run):
    with pytest.raises(Unprotected, match="OpenFilter"):  # the one that is missing then
        run.sealed("site-1", reply_of(change()))


def test_the_server_refuses_a_plain_result(run):
    _, aggregator = begun(run)
    with pytest.raises(Rejected, match="not sealed"):
        run.accepted(aggregator, "site-1", reply_of({n: t.tolist() for n, t in change().items()}))
    assert "not sealed" in aggregator.refused["site-1"]


def test_the_server_refuses_garbage_and_goes_on(run):
    _, aggregator = begun(run)
    for data in (b"", b"garbage" * 100, "text", 3):
        with pytest.raises(Rejected):
            run.accepted(aggregator, "site-1", reply_of({"vitguard.message": data}))
    for site in SITES[1:]:
        run.accepted(aggregator, site, run.sealed(site, reply_of(change())))
    assert aggregator.aggregate_model().params.keys() == {"vitguard.sum.0"}


def test_two_results_with_one_id_count_once(run):
    _, aggregator = begun(run)
    sealed = run.sealed("site-1", reply_of(change()))
    run.accepted(aggregator, "site-1", sealed)
    with pytest.raises(Rejected, match="second message"):
        run.accepted(aggregator, "site-1", run.sealed("site-1", reply_of(change(1))))
    with pytest.raises(Rejected, match="fewer than"):
        aggregator.aggregate_model()


def test_a_result_of_another_site_is_refused(run):
    _, aggregator = begun(run)
    sealed = run.sealed("site-1", reply_of(change()))
    with pytest.raises(Rejected, match="from client 'site-2'"):
        run.accepted(aggregator, "site-2", sealed)


def test_a_result_of_another_round_is_refused(run):
    begun(run)
    old = run.sealed("site-1", reply_of(change()))
    with pytest.raises(Rejected, match="round"):
        run.accepted(run.aggregator(1), "site-1", old)


def test_a_result_about_another_model_is_refused(run):
    initial, aggregator = begun(run)
    other = {n: t + 1 for n, t in initial.items()}
    (run.root / "site-1" / "job" / "vitguard" / "site-1.safetensors").unlink()
    run.opened("site-1", 0, other)
    with pytest.raises(Rejected, match="version of the public model"):
        run.accepted(aggregator, "site-1", run.sealed("site-1", reply_of(change())))


def test_a_result_of_another_job_is_refused(run):
    """With the same keys, the same starting weights and the same round."""
    weights = {n: t.clone() for n, t in SumPersistor(run.manifest, MODEL)._initial().items()}
    save_file(weights, run.root / "initial.safetensors")
    keep = run.persistor(initial=str(run.root / "initial.safetensors"))
    run.opened("site-1", 0, keep.load_model(context(run.root, "server"))["weights"])
    old = run.sealed("site-1", reply_of(change()))
    run.accepted(run.aggregator(0), "site-1", old)
    keep.load_model(context(run.root, "server", job="second"))
    with pytest.raises(Rejected, match="version of the public model"):
        run.accepted(run.aggregator(0, job="second"), "site-1", old)


def test_a_wrong_key_is_refused(run):
    _, aggregator = begun(run)
    others, _ = shared_keys()
    others.for_client("site-1").save(run.root / "site-1.json", "of the clients", overwrite=True)
    with pytest.raises(Rejected, match="other keys"):
        run.accepted(aggregator, "site-1", run.sealed("site-1", reply_of(change())))


def test_a_missing_passphrase_is_said(run, monkeypatch):
    begun(run)
    monkeypatch.delenv("VITGUARD_PASSPHRASE")
    with pytest.raises(InputError, match="environment variable VITGUARD_PASSPHRASE"):
        run.sealed("site-1", reply_of(change()))


def test_too_few_clients_end_the_round(run):
    _, aggregator = begun(run)
    run.accepted(aggregator, "site-1", run.sealed("site-1", reply_of(change())))
    with pytest.raises(Rejected, match="fewer than 2"):
        aggregator.aggregate_model()


def test_a_plain_model_in_the_middle_of_a_run_is_refused(run):
    initial = run.persistor().load_model(context(run.root, "server"))["weights"]
    params, after = played(run, 0, initial)
    run.opened("site-1", 1, dict(params))
    for plain in (initial, after):
        with pytest.raises(Rejected, match="middle of a run"):
            run.opened("site-1", 2, dict(plain))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_initial_model_that_is_not_finite_is_refused(run, value):
    initial = run.persistor().load_model(context(run.root, "server"))["weights"]
    initial["bias"][0] = value
    with pytest.raises(Rejected, match="finite"):
        run.opened("site-1", 0, dict(initial))


def test_an_old_sum_or_a_false_one_is_refused_and_uses_no_round_up(run):
    initial = run.persistor().load_model(context(run.root, "server"))["weights"]
    first, _ = played(run, 0, initial)
    ((name, total),) = first.items()
    flipped = bytearray(total)
    flipped[-1] ^= 1
    with pytest.raises(Rejected):
        run.opened("site-1", 1, {name: bytes(flipped)})
    held = run.opened("site-1", 1, dict(first))
    again = run.opened("site-1", 1, dict(first))  # a task that is sent again
    assert all(torch.equal(held[n], again[n]) for n in held)
    second, _ = played(run, 1, first)
    run.opened("site-1", 2, dict(second))
    with pytest.raises(Rejected, match=r"old sum|after round"):
        run.opened("site-1", 3, dict(first))


def test_a_client_that_comes_back_catches_up_with_the_sums_that_are_kept(run):
    keep = run.persistor(keep=3)
    params = keep.load_model(context(run.root, "server"))["weights"]
    run.opened("site-3", 0, dict(params))  # and then it is away for two rounds
    for number in range(2):
        params, after = played(run, number, params, SITES[:2], run.persistor(keep=3))
    held = run.opened("site-3", 2, dict(params))
    other = run.opened("site-1", 2, dict(params))
    assert all(torch.equal(held[n], other[n]) for n in held)
    assert all(torch.allclose(held[n], after[n], atol=1e-3) for n in held)


def test_a_client_that_missed_a_sum_is_refused_and_never_trains_on_another_model(run):
    params = run.persistor().load_model(context(run.root, "server"))["weights"]
    run.opened("site-3", 0, dict(params))
    for number in range(2):
        params, _ = played(run, number, params, SITES[:2])
    with pytest.raises(Rejected, match="version of the public model"):
        run.opened("site-3", 2, dict(params))


def test_a_server_that_restarts_sends_the_sum_and_knows_the_version(run):
    initial = run.persistor().load_model(context(run.root, "server"))["weights"]
    params, _ = played(run, 0, initial)
    again = run.persistor().load_model(context(run.root, "server"))["weights"]
    assert again == params
    played(run, 1, again)
    with pytest.raises(Rejected, match="after"):
        run.persistor().save_model(
            make_model_learnable({"vitguard.sum.0": b"x"}, {}), context(run.root, "server")
        )


def test_a_plain_aggregate_is_never_kept(run):
    run.persistor().load_model(context(run.root, "server"))
    with pytest.raises(Rejected, match="not one encrypted sum"):
        run.persistor().save_model(make_model_learnable(change(), {}), context(run.root, "server"))


def test_states_are_of_mode_600_and_refused_where_others_read_them(run):
    begun(run)
    for name in ("site-1/job/vitguard/site-1.safetensors", "server/job/vitguard/server.json"):
        path = run.root / name
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    os.chmod(path := run.root / "site-1/job/vitguard/site-1.safetensors", 0o644)
    with pytest.raises(Rejected, match="others may read"):
        run.sealed("site-1", reply_of(change()))
    os.chmod(path, 0o600)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(Rejected, match="state"):
        run.sealed("site-1", reply_of(change()))


@pytest.mark.parametrize(("most", "taken"), [(None, True), (2, True), (1, False), (0, False)])
def test_clipped_values_are_counted_and_the_server_may_refuse_them(run, most, taken):
    _, aggregator = begun(run)
    aggregator.max_clipped = most
    update = change()
    update["weight"][0, :2] = torch.tensor([float("nan"), 9.0])
    sealed = run.sealed("site-1", reply_of(update), outliers="clip")
    assert from_shareable(sealed).meta[parts.CLIPPED] == 2
    run.accepted(aggregator, "site-2", run.sealed("site-2", reply_of(change())))
    if taken:
        run.accepted(aggregator, "site-1", sealed)
        assert aggregator.refused == {}
        return
    with pytest.raises(Rejected, match="2 values beyond bounds"):
        run.accepted(aggregator, "site-1", sealed)
    with pytest.raises(Rejected, match="1 messages, fewer than 2"):
        aggregator.aggregate_model()


@pytest.mark.parametrize("said", [-1, True, 0.0, "0", None, float("nan")])
def test_a_count_of_clipped_values_that_is_none_is_refused(run, said):
    _, aggregator = begun(run)
    aggregator.max_clipped = 5
    sealed = run.sealed("site-1", reply_of(change()))
    sealed["DXO"]["meta"][parts.CLIPPED] = said
    with pytest.raises(Rejected, match="beyond bounds"):
        run.accepted(aggregator, "site-1", sealed)


def read_only(monkeypatch):
    """As on a disk without room or the right to write; root may write where modes forbid it."""

    def refuses(*args, **named):
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("TemporaryFile", "mkstemp"):
        monkeypatch.setattr(f"vitguard.files.tempfile.{name}", refuses)


def test_a_state_that_cannot_be_written_lets_nothing_in_or_out(run, monkeypatch):
    initial, aggregator = begun(run)
    private = SealFilter(defenses="client-privacy:noise=1", model=NORMED)
    whole = {n: torch.zeros_like(t) for n, t in normed_vit().state_dict().items()}
    for site in SITES[:2]:
        run.accepted(aggregator, site, run.sealed(site, reply_of(change())))
    total = aggregator.aggregate_model().params
    kept = (run.root / "server/job/vitguard/server.json").read_bytes()
    read_only(monkeypatch)
    with pytest.raises(InputError, match="Read-only"):
        run.opened("site-1", 1, dict(total))
    with pytest.raises(InputError, match="Read-only"):
        run.opened("site-4", 0, dict(initial))
    with pytest.raises(InputError, match="Read-only"):
        private.process(reply_of(whole), context(run.root, "site-5"))
    fl_ctx = context(run.root, "server")
    with pytest.raises(InputError, match="Read-only"):
        run.persistor().save_model(make_model_learnable(dict(total), {}), fl_ctx)
    assert (run.root / "server/job/vitguard/server.json").read_bytes() == kept


def test_a_run_directory_that_cannot_be_made_is_one_clear_error(run):
    (run.root / "site-1").write_text("")
    with pytest.raises(InputError, match=r"a folder .*vitguard that can be made"):
        run.opened("site-1", 0, nn.Linear(6, 4).state_dict())


def test_a_state_that_cannot_be_read_is_one_clear_error(run):
    initial = run.persistor().load_model(context(run.root, "server"))["weights"]
    params, _ = played(run, 0, initial)
    state = run.root / "site-1/job/vitguard/site-1.safetensors"
    state.unlink()
    state.mkdir(mode=0o700)
    with pytest.raises(Rejected, match="Is a directory"):
        run.opened("site-1", 1, dict(params))
    (run.root / "server/job/vitguard/sum-0.bin").unlink()
    with pytest.raises(Rejected, match="No such file"):
        run.persistor().load_model(context(run.root, "server"))


def test_a_site_whose_name_is_a_path_is_refused(run):
    with pytest.raises(Unprotected, match="name of a site"):
        run.sealed("../site-1", reply_of(change()))


def test_the_recipe_takes_no_filter_after_the_encryption(run, tmp_path):
    script = tmp_path / "client.py"
    script.write_text("")
    settings = dict(
        manifest=Manifest.from_json(run.manifest), model=MODEL, client_keys="{site}.json",
        server_keys="server.json", signing="signing.json", train_script=str(script),
    )  # fmt: skip
    recipe = encrypted_fedavg(min_clients=2, **settings)
    with pytest.raises(InputError, match="last client filter"):
        recipe.add_client_output_filter(SealFilter(**run.files))
    with pytest.raises(InputError, match="min_clients"):
        encrypted_fedavg(min_clients=1, **settings)
    with pytest.raises(InputError, match="stop_cond"):
        encrypted_fedavg(min_clients=2, stop_cond="accuracy >= 80", **settings)


TINY = {
    "path": "timm.create_model",
    "args": {
        "model_name": "vit_tiny_patch16_224", "img_size": 16, "patch_size": 8, "depth": 1,
        "embed_dim": 24, "num_heads": 2, "num_classes": 3,
    },
}  # fmt: skip


def test_noise_alone_acts_without_encryption(run):
    import timm

    model = timm.create_model(**TINY["args"])
    update = {n: torch.full_like(p, 0.01) for n, p in model.named_parameters()}
    seal = SealFilter(defenses="noise:scale=0.5", model=TINY)
    sealed = seal.process(reply_of(update), context(run.root, "site-1"))
    sent = from_shareable(sealed).data
    assert sent.keys() == update.keys()
    assert not torch.equal(sent["head.weight"], update["head.weight"])


@pytest.mark.parametrize(("weight", "leaves"), [(1, False), (64.5, False), (64, True)])
def test_a_floor_takes_the_weight_of_a_site_for_the_images_behind_its_update(run, weight, leaves):
    import timm

    model = timm.create_model(**TINY["args"])
    update = {n: torch.full_like(p, 0.01) for n, p in model.named_parameters()}
    seal = SealFilter(defenses="batch-floor", model=TINY)
    if leaves:
        seal.process(reply_of(update, weight), context(run.root, "site-1"))
        return
    with pytest.raises(UpdateRefused, match="images"):
        seal.process(reply_of(update, weight), context(run.root, "site-1"))


def test_what_client_privacy_spent_outlives_the_process(run):
    import timm

    model = timm.create_model(**TINY["args"])
    update = {n: torch.full_like(p, 1e-4) for n, p in model.named_parameters()}
    ledgers = []
    for _ in range(2):
        seal = SealFilter(defenses="client-privacy", model=TINY)
        seal.process(reply_of(update), context(run.root, "site-1"))
        assert seal._guard is not None
        ledgers.append(seal._guard.state_bytes(draws=False))
    first, second = (json.loads(b)["ledger"]["client-privacy"] for b in ledgers)
    assert first != second


def test_versions_are_those_of_the_rounds_of_the_whole_package(run):
    initial = run.persistor().load_model(context(run.root, "server"))["weights"]
    state = json.loads((run.root / "server/job/vitguard/server.json").read_text())
    params, _ = played(run, 0, initial)
    later = json.loads((run.root / "server/job/vitguard/server.json").read_text())
    assert later["base"] == next_version(state["base"], params["vitguard.sum.0"])


@pytest.mark.parametrize(
    "spec",
    ["shuffle:ratio=0.5", "positions:kind=frozen", "gate", "noise+shuffle", "privacy:noise=1"],
)
def test_a_filter_takes_defenses_of_the_update_alone(spec):
    """The training happens elsewhere: a shuffle named here would move nothing, and seem to act."""
    with pytest.raises(Unprotected, match="of the update"):
        SealFilter(defenses=spec, model=TINY)


@pytest.mark.parametrize("claimed", [11, 0.5, None, "10"])
def test_a_claimed_weight_that_is_not_the_sealed_one_is_refused(run, claimed):
    _, aggregator = begun(run)
    run.accepted(aggregator, "site-2", run.sealed("site-2", reply_of(change(), 20)))
    sealed = from_shareable(run.sealed("site-1", reply_of(change(), 10)))
    meta = {FLMetaKey.NUM_STEPS_CURRENT_ROUND: claimed}
    false = DXO(DataKind.WEIGHT_DIFF, data=sealed.data, meta=meta).to_shareable()
    with pytest.raises(Rejected) as caught:
        run.accepted(aggregator, "site-1", false)
    assert caught.value.cause == "weight" and "site-1" in aggregator.refused
    true = DXO(DataKind.WEIGHT_DIFF, data=sealed.data, meta=sealed.meta).to_shareable()
    run.accepted(aggregator, "site-1", true)
    assert aggregator.aggregate_model()


@pytest.mark.parametrize(("kept", "start", "left"), [([], 0, 5), ([2], 3, 2), ([3, 4], 5, 0)])
def test_a_job_that_starts_again_goes_on_with_the_round_after_the_last_sum(
    monkeypatch, kept, start, left
):
    params = {f"vitguard.sum.{n}": b"x" for n in kept} or {"weight": torch.zeros(2)}
    monkeypatch.setattr(FedAvg, "load_model", lambda self: FLModel(params=params))
    controller = ResumedFedAvg(num_clients=2, num_rounds=5, persistor_id="persistor")
    assert controller.load_model().params == params
    assert (controller.start_round, controller.num_rounds) == (start, left)


@pytest.mark.parametrize("lacks", ["_create_controller", "_prepare_client_apps"])
def test_the_recipe_of_an_older_release_is_refused(run, monkeypatch, lacks):
    """Its clients would answer every task, and its server would number rounds from 0 again."""
    from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe

    for owner in [c for c in FedAvgRecipe.__mro__ if lacks in vars(c)]:
        monkeypatch.delattr(owner, lacks)
    with pytest.raises(Incompatible, match=r"nvflare 2\.9"):
        encrypted_fedavg(
            manifest=Manifest.from_json(run.manifest), model=MODEL, client_keys="{site}.json",
            server_keys="server.json", signing="signing.json", min_clients=2,
            train_script="client.py",
        )  # fmt: skip


def test_the_recipe_numbers_rounds_on_over_restarts(run, tmp_path):
    script = tmp_path / "client.py"
    script.write_text("")
    recipe = encrypted_fedavg(
        manifest=Manifest.from_json(run.manifest), model=MODEL, client_keys="{site}.json",
        server_keys="server.json", signing="signing.json", train_script=str(script),
        min_clients=2, num_rounds=7, clients=4, round_timeout=90,
    )  # fmt: skip
    recipe.export(str(tmp_path / "job"))
    (config,) = (tmp_path / "job").rglob("config_fed_server.json")
    (workflow,) = json.loads(config.read_text())["workflows"]
    assert workflow["path"] == f"{ResumedFedAvg.__module__}.ResumedFedAvg"
    assert workflow["args"]["num_rounds"] == 7
    assert workflow["args"]["num_clients"] == 4 and workflow["args"]["round_timeout"] == 90


@pytest.mark.parametrize(
    "wrong",
    [
        {"clients": 1}, {"clients": 2.0}, {"round_timeout": -1}, {"round_timeout": 1.5},
        {"max_clipped": -1}, {"max_clipped": True},
    ],
)  # fmt: skip
def test_a_round_that_cannot_be_meant_is_refused_by_the_recipe(run, wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        encrypted_fedavg(
            manifest=Manifest.from_json(run.manifest), model=MODEL, client_keys="{site}.json",
            server_keys="server.json", signing="signing.json", min_clients=2,
            train_script="client.py", **wrong,
        )  # fmt: skip


@pytest.mark.parametrize("seconds", [0, 90])
def test_a_site_that_died_ends_no_round(monkeypatch, seconds):
    """NVFlare waits for its answer without end, or ends the job at an error, unless it is told."""
    sent = []
    monkeypatch.setattr(FedAvg, "send_model", lambda self, **settings: sent.append(settings))
    controller = ResumedFedAvg(num_clients=3, num_rounds=1, persistor_id="p", round_timeout=seconds)
    controller.send_model(task_name="train")
    assert sent == [{"task_name": "train", "timeout": seconds}]
    panics, said = [], []
    monkeypatch.setattr(controller, "panic", panics.append)
    monkeypatch.setattr(controller, "warning", said.append)
    controller._current_failed_clients, controller._current_num_targets = set(), 3
    controller._current_min_responses = 3
    died = make_reply(ReturnCode.EXECUTION_EXCEPTION)
    assert not controller._accept_train_result("site-2", died, FLContext())
    assert not panics and "site-2" in said[0]


def test_a_site_keeps_the_progress_of_the_whole_package_and_refuses_another(run):
    initial = run.persistor().load_model(context(run.root, "server"))["weights"]
    params, _ = played(run, 0, initial)
    run.opened("site-1", 1, dict(params))
    file = run.root / "site-1/job/vitguard/site-1.safetensors"
    state = ClientState.read(file, Manifest.from_json(run.manifest).digest().hex())
    server = json.loads((run.root / "server/job/vitguard/server.json").read_text())
    assert state.progress == Progress(0, server["base"])
    data = file.read_bytes().replace(b'opened\\\\\\": 0', b'opened\\\\\\": x')
    assert data != file.read_bytes()
    file.write_bytes(data)
    with pytest.raises(Rejected, match="state"):
        run.opened("site-1", 2, dict(params))


def test_a_server_that_starts_again_before_the_first_sum_hands_out_the_same_initial_model(run):
    """Sites hold the model that it handed out first, and refuse another one in the same run."""
    first = run.persistor().load_model(context(run.root, "server"))["weights"]
    run.opened("site-1", 0, first)
    again = run.persistor().load_model(context(run.root, "server"))["weights"]
    assert all(torch.equal(first[n], again[n]) for n in first)
    run.opened("site-1", 0, again)
    file = run.root / "server" / "job" / "vitguard" / "initial.safetensors"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    other = SumPersistor(run.manifest, MODEL)._initial()
    file.write_bytes(save(other))
    with pytest.raises(Rejected, match="another initial model"):
        run.persistor().load_model(context(run.root, "server"))


def normed_vit():
    model = small_vit(img_size=8, embed_dim=12, depth=1, num_heads=3, num_classes=2)
    model.head = nn.Sequential(nn.BatchNorm1d(12), nn.Linear(12, 2))
    return model


NORMED = {"path": f"{__name__}.normed_vit"}


def test_counters_of_batch_norms_are_left_out_of_what_is_sealed(run):
    """They fit no ciphertext, cannot be noised, and nobody can freeze them."""
    whole = normed_vit().state_dict()
    manifest = Manifest.of(whole, bounds=BOUND, max_weight=HEAVIEST)
    normed = Run(run.root, manifest.to_json(), run.keys)
    difference = {
        n: torch.full_like(t, 0.01) if t.is_floating_point() else t + 3 for n, t in whole.items()
    }
    normed.opened("site-1", 0, whole)
    assert list(from_shareable(normed.sealed("site-1", reply_of(difference))).data) == [
        parts.MESSAGE
    ]
    private = SealFilter(defenses="client-privacy:noise=1", model=NORMED)
    noised = private.process(reply_of(difference), context(run.root, "site-2"))
    names = {n for n, t in whole.items() if t.is_floating_point()}
    assert {*from_shareable(noised).data} == names


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.complex64])
def test_buffers_that_nobody_trains_are_finite_too(run, kind, value):
    whole = nn.Linear(6, 4).state_dict() | {"kept": torch.tensor([1.0, value]).to(kind)}
    with pytest.raises(Rejected, match="kept with values that are not finite"):
        run.opened("site-1", 0, whole)
    save_file(whole, run.root / "start.safetensors")
    persistor = run.persistor(initial=str(run.root / "start.safetensors"))
    with pytest.raises(Rejected, match="kept with values that are not finite"):
        persistor.load_model(context(run.root, "server"))
    run.opened("site-1", 0, whole | {"kept": torch.zeros(2, dtype=kind)})
    with pytest.raises(Unprotected, match="a change of kept"):
        run.sealed("site-1", reply_of(change() | {"kept": whole["kept"]}))


@pytest.mark.parametrize("value", [1 + 0j, 0.5], ids=str)
def test_a_change_that_fits_no_ciphertext_is_not_dropped_in_silence(run, value):
    kept = torch.tensor([value])
    start = nn.Linear(6, 4).state_dict() | {"kept": torch.zeros_like(kept)}
    run.opened("site-1", 0, start)
    with pytest.raises(Unprotected, match="a change of kept"):
        run.sealed("site-1", reply_of(change() | {"kept": kept}))
    run.sealed("site-1", reply_of(change() | {"kept": torch.zeros_like(kept)}))


@pytest.mark.parametrize("defenses", ["noise:scale=0.1", "pruning:keep=0.5"])
@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("head.0.running_mean", torch.zeros(5), "running_mean of shape"),
        ("head.0.num_batches_tracked", torch.zeros(5, dtype=torch.int64), "tracked of shape"),
        ("head.0.running_mean", torch.zeros(12, dtype=torch.int64), "floating-point"),
        ("head.0.running_var", torch.full((12,), float("nan")), "finite"),
    ],
)
def test_buffers_leave_as_the_model_has_them(run, defenses, name, wrong, said):
    """A server that adds them would fail, or spread one buffer of a site over another's."""
    whole = normed_vit().state_dict()
    update = {n: torch.zeros_like(t) for n, t in whole.items()}
    seal = SealFilter(defenses=defenses, model=NORMED)
    with pytest.raises(InputError, match=said):
        seal.process(reply_of(update | {name: wrong}), context(run.root, "site-1"))
    seal.process(reply_of(update), context(run.root, "site-1"))


def test_a_release_that_a_later_defense_refuses_stays_counted_over_restarts(run, monkeypatch):
    """What is refused after the noise tells something; a site that restarts must know of it."""
    stack = "client-privacy:noise=1+quantised-update"
    whole = normed_vit().state_dict()
    difference = {n: torch.full_like(t, 0.01) for n, t in whole.items() if t.is_floating_point()}

    def refuses(*args, **named):
        raise InputError("refused")

    with monkeypatch.context() as patch:
        patch.setattr("vitguard.defenses.quantised_update.QuantisedUpdate.seal", refuses)
        with pytest.raises(InputError):
            SealFilter(defenses=stack, model=NORMED).process(
                reply_of(difference), context(run.root, "site-1")
            )
    SealFilter(defenses=stack, model=NORMED).process(
        reply_of(difference, number=1), context(run.root, "site-1", number=1)
    )
    (file,) = (run.root / "site-1").rglob("*.safetensors")
    ledger = json.loads(ClientState.read(file, "").guard)["ledger"]["client-privacy"]
    assert sum(steps for history in ledger["runs"].values() for _, _, steps in history) == 2


def test_error_feedback_is_refused_where_the_filter_is_made():
    with pytest.raises(Unprotected, match="without feedback"):
        SealFilter(defenses="low-rank:rank=1,feedback=true", model=NORMED)


@pytest.mark.parametrize(
    ("said", "settings"),
    [
        ("neither", {"defenses": "none"}),
        ("by keys and manifest", {"defenses": "encryption"}),
        ("by keys and manifest", {"defenses": "noise+masking"}),
        ("outliers 'refuse' or 'clip'", {"defenses": "noise", "outliers": "drop"}),
        ("with keys", {"defenses": "noise", "outliers": "clip"}),
    ],
)
def test_a_filter_that_would_not_do_what_it_says_is_refused_where_it_is_made(said, settings):
    with pytest.raises((Unprotected, InputError), match=said):
        SealFilter(model=NORMED, **settings)


@pytest.mark.parametrize("weight", [np.int64(10), np.float32(10), 10])
def test_numbers_of_numpy_are_numbers(run, weight):
    """What `labels.size` sums up to, and a mean loss."""
    run.opened("site-1", 0, change())
    loss = {"loss": np.float32(0.5)}
    sealed = run.sealed("site-1", reply_of(change(), weight, initial_metrics=loss))
    meta = from_shareable(sealed).meta
    assert meta[FLMetaKey.NUM_STEPS_CURRENT_ROUND] == 10.0 and meta["initial_metrics"] == {
        "loss": 0.5
    }
    assert type(meta["initial_metrics"]["loss"]) is float


def test_arguments_that_a_model_does_not_take_are_named(run):
    model = {"path": "torch.nn.Linear", "args": {"width": 3}}
    with pytest.raises(InputError, match="width"):
        SumPersistor(run.manifest, model).load_model(context(run.root, "server"))
