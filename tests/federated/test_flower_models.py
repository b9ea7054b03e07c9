"""Models that are more than floating-point parameters, and messages that spell names otherwise."""

import pytest
import torch
from torch import nn

pytest.importorskip("flwr", reason="needs vitguard[flower]")

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

import vitguard as vg
from tests.federated import flower_rounds, masked_rounds
from tests.federated.flower_rounds import Federated
from tests.federated.masked_rounds import Masked
from tests.federated.test_flower_faults import through_bytes
from vitguard.federated.flower import ClientKeys, InProcessGrid, ProtectMod, attach

FROZEN = "positions:kind=frozen"


def plain(small_vit):
    return small_vit(img_size=8, embed_dim=12, depth=1, num_heads=3, num_classes=2)


def normed(small_vit):
    """A head with a batch norm, as linear probes of masked autoencoders have."""
    model = plain(small_vit)
    model.head = nn.Sequential(nn.BatchNorm1d(12), nn.Linear(12, 2))
    return model


def flagged(small_vit):
    model = plain(small_vit)
    model.register_buffer("flag", torch.tensor([True, False]))
    model.register_buffer("bytes", torch.tensor([250, 3], dtype=torch.uint8))
    model.register_buffer("nothing", torch.zeros(0))
    model.register_parameter("scale", nn.Parameter(torch.tensor(1.5)))
    return model


def added(node, state):
    """What a node trains: each number grows by a constant, counters by whole ones."""
    return {
        k: t + 0.001 * node if t.is_floating_point() else t if t.dtype == torch.bool else t + node
        for k, t in state.items()
    }


class Nodes:
    """Three nodes under a stock strategy; `reasons` is why replies were refused."""

    def __init__(self, make, stack="", change=added, read=None, more=None):
        self.make, self.stack, self.change, self.more = make, stack, change, more
        self.read = read or (lambda model, given: model.load_state_dict(given, strict=False))
        self.grid = InProcessGrid({node: self.app(node) for node in (1, 2, 3)}, record=True)
        self.reasons, self.trained, self.replies = [], 0, []

    def app(self, node):
        app = ClientApp(mods=[ProtectMod()])

        @app.train()
        def train(message, context):
            model = self.make()
            attach(vg.protect(model, self.stack or []))
            given = message.content["arrays"].to_torch_state_dict()
            self.read(model, given)
            self.trained += 1
            state = self.change(node, model.state_dict())
            content = {"arrays": ArrayRecord(state), "metrics": MetricRecord({"num-examples": 2})}
            return Message(RecordDict({**content, **(self.more or {})}), reply_to=message)

        @app.query()
        def query(message, context):
            return Message(RecordDict({"answer": ConfigRecord({"value": 7})}), reply_to=message)

        return app

    def run(self, start, rounds=2):
        outer = self

        class Watched(FedAvg):
            def aggregate_train(self, number, replies):
                replies = list(replies)
                outer.replies += replies
                outer.reasons += [r.error.reason for r in replies if r.has_error()]
                return super().aggregate_train(number, replies)

        start = start if isinstance(start, ArrayRecord) else ArrayRecord(start)
        result = Watched(fraction_evaluate=0.0).start(self.grid, start, num_rounds=rounds)
        return result.arrays.to_torch_state_dict() if result.arrays else None


def test_counters_of_batch_norms_keep_their_shape_over_rounds_of_a_stock_strategy(small_vit):
    start = normed(small_vit).state_dict()
    nodes = Nodes(lambda: normed(small_vit), FROZEN)
    after = nodes.run(start, rounds=3)
    assert not nodes.reasons
    counter = after["head.0.num_batches_tracked"]
    assert counter.shape == () and float(counter) == 6.0  # three rounds of the mean of 1, 2, 3
    for name in ("head.0.running_mean", "head.0.running_var", "head.1.weight"):
        assert torch.allclose(after[name], start[name] + 0.006, atol=1e-5), name


def test_an_averaged_counter_takes_no_part_of_the_clip_of_client_privacy(small_vit):
    """A server's average makes numbers of counters; their change is no part of the update."""
    stack = [vg.ClientPrivacy(noise=1e-6, clip=1.0, rounds=9)]
    start = normed(small_vit).state_dict()
    nodes = Nodes(lambda: normed(small_vit), stack)
    after = nodes.run(start, rounds=3)
    assert not nodes.reasons
    assert torch.allclose(after["head.1.weight"], start["head.1.weight"] + 0.006, atol=1e-3)
    assert float(after["head.0.num_batches_tracked"]) == 0.0  # it is not sent


def test_truth_values_bytes_empty_tensors_and_single_numbers_go_through(small_vit):
    start = flagged(small_vit).state_dict()
    nodes = Nodes(lambda: flagged(small_vit), FROZEN)
    after = nodes.run(start)
    assert not nodes.reasons
    assert after["flag"].tolist() == [1.0, 0.0] and after["nothing"].shape == (0,)
    assert after["scale"].shape == () and float(after["scale"]) == pytest.approx(1.504)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Federated, Masked])
@pytest.mark.parametrize("make", [normed, flagged])
def test_buffers_are_in_the_secure_sum_that_the_guard_describes(small_vit, monkeypatch, kind, make):
    for module in (flower_rounds, masked_rounds):
        monkeypatch.setattr(module, "tiny", make)
    federated = kind(small_vit)
    strategy, _ = federated.run(2)
    assert strategy.refused == {1: {}, 2: {}}
    names = (federated.manifest if kind is Federated else federated.terms.manifest).names
    buffers = {n for n, b in make(small_vit).named_buffers() if b.is_floating_point()}
    assert buffers <= {*names}
    seen = next(iter(federated.seen.values()))[1]
    moved = federated.moved()
    for name in sorted(buffers & {*names}):
        assert torch.allclose(seen[name], federated.start[name] + moved, atol=1e-4), name
        assert seen[name].shape == federated.start[name].shape


@pytest.mark.parametrize("by_server", [True, False], ids=["both", "client"])
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_names_of_a_wrapped_model_are_those_of_the_model(small_vit, prefix, by_server):
    bare = plain(small_vit).state_dict()
    sent = prefix if by_server else ""
    start = {sent + k: t for k, t in bare.items()}
    nodes = Nodes(
        lambda: plain(small_vit),
        read=lambda m, given: m.load_state_dict({k[len(sent) :]: t for k, t in given.items()}),
        change=lambda n, state: {prefix + k: t for k, t in added(n, state).items()},
    )
    after = nodes.run(start)
    assert not nodes.reasons and after.keys() == start.keys()
    assert all(torch.allclose(after[k], start[k] + 0.004, atol=1e-5) for k in start)


def test_an_adapter_by_the_names_that_peft_saves_is_trained(small_vit):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["qkv"])

    class Adapters(Nodes):
        def app(self, node):
            app = ClientApp(mods=[ProtectMod()])

            @app.train()
            def train(message, context):
                model = peft.get_peft_model(plain(small_vit), config)
                attach(vg.protect(model, [vg.GradientNoise(scale=1e-6)]))
                given = message.content["arrays"].to_torch_state_dict()
                peft.set_peft_model_state_dict(model, given)
                state = added(node, peft.get_peft_model_state_dict(model))
                metrics = MetricRecord({"num-examples": 2})
                content = RecordDict({"arrays": ArrayRecord(state), "metrics": metrics})
                return Message(content, reply_to=message)

            return app

    start = peft.get_peft_model_state_dict(peft.get_peft_model(plain(small_vit), config))
    nodes = Adapters(None)
    after = nodes.run(start)
    assert not nodes.reasons
    assert all(torch.allclose(after[k], start[k] + 0.004, atol=1e-4) for k in start)


@pytest.mark.parametrize("sent", [True, False], ids=["sent by the server", "new"])
def test_a_change_that_the_guard_does_not_share_is_refused_not_lost(small_vit, sent):
    """A module beside the protected model, such as a projection, or a name spelled otherwise."""
    beside = {"projection.weight": torch.zeros(3)}
    start = {**plain(small_vit).state_dict(), **(beside if sent else {})}
    nodes = Nodes(
        lambda: plain(small_vit),
        change=lambda n, state: {**added(n, state), "projection.weight": torch.ones(3)},
    )
    assert nodes.run(start, rounds=1) is None
    assert len(nodes.reasons) == 3 and "projection.weight" in nodes.reasons[0]


def test_what_the_guard_does_not_share_may_come_back_as_it_was(small_vit):
    beside = {"projection.weight": torch.arange(3.0)}
    nodes = Nodes(lambda: plain(small_vit), change=lambda n, state: {**added(n, state), **beside})
    after = nodes.run({**plain(small_vit).state_dict(), **beside}, rounds=1)
    assert not nodes.reasons and torch.equal(after["projection.weight"], torch.arange(3.0))


def test_a_token_that_the_server_does_not_share_is_refused_before_training(small_vit):
    nodes = Nodes(lambda: plain(small_vit), "shuffle:ratio=0.5")
    assert nodes.run(plain(small_vit).state_dict(), rounds=1) is None
    assert not nodes.trained and "vitguard.shuffle.unknown" in nodes.reasons[0]
    shared = plain(small_vit)
    vg.protect(shared, "shuffle:ratio=0.5")
    nodes = Nodes(lambda: plain(small_vit), "shuffle:ratio=0.5")
    after = nodes.run(shared.state_dict(), rounds=1)
    assert not nodes.reasons
    token = "vitguard.shuffle.unknown"
    assert torch.allclose(after[token], shared.state_dict()[token] + 0.002, atol=1e-5)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_client_whose_weights_are_not_finite_is_left_out_under_a_stock_strategy(small_vit, wrong):
    def diverges(node, state):
        moved = added(node, state)
        return {k: t * wrong for k, t in moved.items()} if node == 2 else moved

    nodes = Nodes(lambda: plain(small_vit), FROZEN, change=diverges)
    start = plain(small_vit).state_dict()
    after = nodes.run(start, rounds=1)
    assert len(nodes.reasons) == 1 and "finite" in nodes.reasons[0]
    assert torch.allclose(after["head.weight"], start["head.weight"] + 0.002, atol=1e-5)


def test_a_record_that_would_be_dropped_from_a_reply_is_refused(small_vit):
    nodes = Nodes(lambda: plain(small_vit), more={"notes": ConfigRecord({"site": "north"})})
    assert nodes.run(plain(small_vit).state_dict(), rounds=1) is None
    assert len(nodes.reasons) == 3 and "'notes'" in nodes.reasons[0]


def test_a_query_without_arrays_is_answered_and_one_with_arrays_in_the_answer_is_not(small_vit):
    nodes = Nodes(lambda: plain(small_vit))
    ask = Message(RecordDict({"q": ConfigRecord({"x": 1})}), dst_node_id=1, message_type="query")
    (reply,) = nodes.grid.send_and_receive([ask])
    assert not reply.has_error() and reply.content["answer"]["value"] == 7

    app = ClientApp(mods=[ProtectMod()])

    @app.query()
    def query(message, context):
        leak = ArrayRecord(plain(small_vit).state_dict())
        return Message(RecordDict({"answer": leak}), reply_to=message)

    (reply,) = InProcessGrid({1: app}).send_and_receive([ask])
    assert reply.has_error() and "arrays" in reply.error.reason


@pytest.mark.slow
def test_a_schedule_goes_on_over_rounds_and_over_restarts_of_the_client(small_vit):
    """A warm-up that began anew in every message would never end: nothing would be shuffled."""
    stack = "shuffle:ratio=0.9,warmup=4,steps=8,schedule=linear"
    shared = plain(small_vit)
    vg.protect(shared, stack)
    start, seen = shared.state_dict(), {}

    def app(node):
        app = ClientApp(mods=[ProtectMod()])

        @app.train()
        def train(message, context):
            model = plain(small_vit)
            guard = attach(vg.protect(model, stack))
            model.load_state_dict(message.content["arrays"].to_torch_state_dict())
            model.train()
            optimizer = guard.prepare(torch.optim.SGD(model.parameters(), lr=0.01))
            for _ in range(3):
                model(torch.randn(2, 3, 8, 8)).sum().backward()
                optimizer.step()
            moved = guard.truth()["shuffled"].any()
            seen.setdefault(node, []).append((int(model.vitguard.shuffle.step), bool(moved)))
            arrays, metrics = ArrayRecord(model.state_dict()), MetricRecord({"num-examples": 1})
            content = RecordDict({"arrays": arrays, "metrics": metrics})
            return Message(content, reply_to=message)

        return app

    grid = InProcessGrid({1: app(1), 2: app(2)})
    arrays = ArrayRecord(start)
    for _ in range(3):  # the server sends what it has: a schedule that did not begin
        result = FedAvg(fraction_evaluate=0.0).start(grid, arrays, num_rounds=1)
        for node in grid.apps:
            grid.contexts[node] = through_bytes(grid.contexts[node])
        arrays = result.arrays
    assert int(arrays.to_torch_state_dict()["vitguard.shuffle.step"]) == 0
    assert seen == {n: [(3, False), (6, False), (9, True)] for n in (1, 2)}


def test_positions_that_the_server_drew_are_those_of_every_client_and_message(small_vit):
    """A draw of its own for each message would train a model that fits none of them."""
    stack = "positions:kind=random"
    used = []

    def read(model, given):
        model.load_state_dict(given)
        used.append(model.pos_embed.clone())

    nodes = Nodes(lambda: plain(small_vit), stack, read=read)
    assert nodes.run(plain(small_vit).state_dict(), rounds=1) is None
    assert "vitguard.positions.fixed" in nodes.reasons[0] and not used
    shared = plain(small_vit)
    vg.protect(shared, stack)
    nodes = Nodes(lambda: plain(small_vit), stack, read=read)
    nodes.run(shared.state_dict(), rounds=3)
    assert not nodes.reasons and len(used) == 9
    assert all(torch.allclose(u, shared.pos_embed, atol=1e-6) for u in used)


def gated(small_vit, stack, batch=True):
    """One node that trains on one image, under a stack with a gate."""
    app, grads = ClientApp(mods=[ProtectMod()]), []
    pixels = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    images, labels = 2 * pixels - 1, torch.tensor([1])

    @app.train()
    def train(message, context):
        model = plain(small_vit)
        guard = vg.protect(model, stack)
        attach(guard, batch=(images, labels) if batch else None)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        model.train()
        optimizer = guard.prepare(torch.optim.SGD(model.parameters(), lr=0.05))
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        grads.append(model.head.weight.detach().clone())
        arrays, metrics = ArrayRecord(model.state_dict()), MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    grid = InProcessGrid({1: app})
    start = ArrayRecord(plain(small_vit).state_dict())
    ask = Message(RecordDict({"arrays": start, "config": ConfigRecord()}), 1, "train")
    (reply,) = grid.send_and_receive([ask])
    return reply, grads


def test_a_gate_gets_the_images_of_attach_and_the_server_is_not_told_how_well_they_are_seen(
    small_vit,
):
    reply, grads = gated(small_vit, "gate:max_gain=6,work=5", batch=False)
    assert reply.has_error() and "batch=(images, labels)" in reply.error.reason and not grads
    reply, grads = gated(small_vit, "gate:max_gain=6,work=5")
    assert grads and reply.has_error()
    assert reply.error.reason == "GateClosed: the client's gate did not let the update leave"
    reply, _ = gated(small_vit, "noise:scale=100+gate:max_gain=6,work=5,undecided=pass")
    assert not reply.has_error() and reply.content.array_records


def test_error_feedback_is_refused_before_training(small_vit):
    nodes = Nodes(lambda: plain(small_vit), "low-rank:rank=1,feedback=true")
    assert nodes.run(plain(small_vit).state_dict(), rounds=1) is None
    assert not nodes.trained and "feedback" in nodes.reasons[0]


def test_a_server_whose_model_has_other_positions_than_clients_train_with_is_told(small_vit):
    """Its own evaluation, and the model that it saves, would be of positions nobody trained."""
    nodes = Nodes(lambda: plain(small_vit), "positions:kind=sincos")
    assert nodes.run(plain(small_vit).state_dict(), rounds=1) is None
    assert "pos_embed" in nodes.reasons[0] and "starting model" in nodes.reasons[0]
    shared = plain(small_vit)
    vg.protect(shared, "positions:kind=sincos")
    nodes = Nodes(lambda: plain(small_vit), "positions:kind=sincos")
    assert nodes.run(shared.state_dict()) is not None and not nodes.reasons


def tied(small_vit):
    model = plain(small_vit)
    model.blocks.append(model.blocks[0])
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Federated, Masked])
def test_tied_parameters_are_in_the_secure_sum_by_each_of_their_names(small_vit, monkeypatch, kind):
    for module in (flower_rounds, masked_rounds):
        monkeypatch.setattr(module, "tiny", tied)
    federated = kind(small_vit)
    strategy, _ = federated.run(2)
    assert strategy.refused == {1: {}, 2: {}}
    seen = next(iter(federated.seen.values()))[1]
    for name in ("blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight"):
        moved = federated.start[name] + federated.moved()
        assert torch.allclose(seen[name], moved, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Federated, Masked])
def test_the_metric_that_a_strategy_weighs_by_is_the_weight_that_clients_sign(small_vit, kind):
    federated = kind(small_vit)
    for node in federated.names:
        federated.spoil[node] = lambda state, own: (state, own | {"steps": 2.0})
    strategy, _ = federated.run(2, weighted_by_key="steps")
    assert strategy.refused == {1: {}, 2: {}}
    seen = next(iter(federated.seen.values()))[1]["head.bias"]
    even = sum(0.001 * (n - 10) for n in federated.names) / len(federated.names)
    assert torch.allclose(seen, federated.start["head.bias"] + even, atol=2e-3)
    assert even + 3e-4 < federated.moved()  # another average than that by examples


def test_as_many_nodes_are_asked_as_a_sum_needs(small_vit):
    federated = Federated(small_vit)
    _, result = federated.run(1, min_clients=3, fraction_train=0.1)
    assert result.train_metrics_clientapp[1]["loss"] == pytest.approx(0.5)


def test_a_mod_that_is_there_twice_says_so(small_vit):
    federated = Federated(small_vit)
    keys = ClientKeys("1", federated.keys.for_client("1"), federated.manifest)
    mods = [ProtectMod(lambda context: keys) for _ in range(2)]
    federated.grid.apps[12] = federated.app(12, mods)
    strategy, _ = federated.run(1)
    assert "twice" in strategy.refused[1][12]


def test_withheld_positions_go_on_on_each_client_and_never_leave_it(small_vit):
    """Positions that began at the public ones in every message would never drift from them."""
    used, ended = {}, {}

    def read(model, given):
        model.load_state_dict(given)
        used.setdefault(len(used), model.pos_embed.detach().clone())
        with torch.no_grad():  # what a client trains of them
            model.pos_embed += 1.0
        ended[len(ended)] = model.pos_embed.detach().clone()

    start = plain(small_vit).state_dict()
    nodes = Nodes(lambda: plain(small_vit), "withheld", read=read)
    after = nodes.run(start, rounds=3)
    assert not nodes.reasons and len(used) == 9
    public = start["pos_embed"]
    for place, positions in used.items():
        assert torch.allclose(positions, public + place // 3, atol=1e-5)
    assert torch.allclose(after["pos_embed"], public, atol=1e-6)
    drifted = [t.numpy().tobytes()[:32] for t in ended.values()]
    everything = b"".join(nodes.grid.sent)
    assert public.numpy().tobytes()[:32] in everything  # the search finds
    assert not any(d in everything for d in drifted)
