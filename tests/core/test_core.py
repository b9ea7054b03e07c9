"""The nouns: what can be read, what a difference says, and files that are not trusted."""

import json
import math
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from vitguard.core import Normalization, Update
from vitguard.errors import Blocked, InputError, NotApplicable


def test_normalization_inverts_what_it_applied(photos):
    normalization = Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    applied = normalization.apply(photos)
    assert torch.allclose(applied[:, 1], (photos[:, 1] - 0.2) / 0.5)
    assert torch.allclose(normalization.invert(applied), photos, atol=1e-6)


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((0.5,), (0.5, 0.5)),
        ((), ()),
        ((0.5,), (0.0,)),
        ((0.5,), (math.nan,)),
        ((0.5,), (math.inf,)),
        ((math.nan,), (0.5,)),
        ((123.7, 116.3, 103.5), (58.4, 57.1, 57.4)),
        ((0.5,), (58.4,)),
        ((123.7,), (0.5,)),
        ((-0.1,), (0.5,)),
    ],
)
def test_normalization_refuses_what_cannot_be_inverted_or_is_not_for_pixels_in_0_to_1(mean, std):
    with pytest.raises(InputError, match=r"by 255|as many means"):
        Normalization(mean, std)


def test_pixels_of_other_channels_are_not_spread_over_the_means():
    grey = torch.rand(2, 1, 4, 4)
    for step in (Normalization().apply, Normalization().invert):
        with pytest.raises(InputError, match=r"images of 3 channels.*got torch.float32.*2, 1, 4"):
            step(grey)
    one = Normalization((0.5,), (0.5,))
    assert torch.equal(one.apply(grey.expand(2, 3, 4, 4))[:, :1], one.apply(grey))


def test_whole_numbers_are_not_normalised_by_rounded_means():
    with pytest.raises(InputError, match="floating-point images"):
        Normalization().apply(torch.ones(1, 3, 4, 4, dtype=torch.uint8))


def test_sealed_names_are_listed_but_unreadable():
    update = Update({"a": torch.ones(2), "b": torch.zeros(1)}).seal({"a": "it is encrypted"})
    assert not update.can_read("a")
    assert "a" in update.sealed
    with pytest.raises(Blocked, match="a cannot be read: it is encrypted"):
        update.read("a")
    with pytest.raises(Blocked, match="not in the update"):
        update.read("c")
    assert torch.equal(update.read("b"), torch.zeros(1))


def test_blocked_survives_a_worker_process():
    error = pickle.loads(pickle.dumps(Blocked("a", "why")))
    assert (error.name, error.reason) == ("a", "why")


def test_repr_shows_no_values():
    text = repr(Update({"a": torch.full((3,), 0.123456)}))
    assert "0.123" not in text and "3 values" in text


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "gradients"},
        {"batch_size": 0},
        {"batch_size": 1.5},
        {"local_steps": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"learning_rate": -0.1},
        {"momentum": 1.0},
        {"momentum": math.nan},
        {"weight_decay": math.nan},
        {"sealed": {"a": "secret, and readable at the same time"}},
    ],
)
def test_update_refuses_impossible_facts(wrong):
    with pytest.raises(InputError):
        Update({"a": torch.ones(1)}, **wrong)


@pytest.mark.parametrize(("decay", "momentum"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.9), (0.1, 0.9)])
def test_the_difference_of_one_sgd_step_gives_the_gradient_back(decay, momentum):
    model = torch.nn.Linear(3, 2).double()
    model(torch.randn(4, 3).double()).square().sum().backward()
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    gradient = {k: p.grad.clone() for k, p in model.named_parameters()}
    torch.optim.SGD(model.parameters(), 0.05, momentum, weight_decay=decay).step()
    delta = {k: p.detach() - before[k] for k, p in model.named_parameters()}
    model.load_state_dict(before)
    update = Update(
        delta, "difference", learning_rate=0.05, momentum=momentum, weight_decay=decay
    ).as_gradient(model)
    assert update.kind == "gradient"
    for name, expected in gradient.items():
        assert torch.allclose(update.read(name), expected, rtol=1e-9, atol=1e-12)


def test_several_steps_give_the_sum_of_gradients_and_only_when_asked():
    update = Update({"a": torch.full((1,), -0.6)}, "difference", local_steps=3, learning_rate=0.1)
    model = torch.nn.Linear(1, 1)
    with pytest.raises(NotApplicable, match="3 local steps"):
        update.as_gradient(model)
    assert update.as_gradient(model, steps=True).read("a").item() == pytest.approx(6)


@pytest.mark.parametrize(
    "facts",
    [
        {"learning_rate": 0.1, "optimizer": "adamw"},
        {"learning_rate": None},
        {"learning_rate": 0.1, "local_steps": 2, "weight_decay": 0.1},
    ],
)
def test_a_difference_that_determines_no_gradient_says_so(facts):
    update = Update({"a": torch.ones(1)}, "difference", **facts)
    with pytest.raises(NotApplicable):
        update.as_gradient(torch.nn.Linear(1, 1), steps=True)


def test_save_and_load_keep_everything(tmp_path):
    update = Update(
        {"a.b": torch.randn(2, 3), "half": torch.randn(4).bfloat16()},
        "difference", 3, 2, 0.1, "sgd", 0.5, 0.01, {"c": "encrypted"}, {"encryption": b"\x00\xff"},
    )  # fmt: skip
    update.save(tmp_path / "u.safetensors")
    again = Update.load(tmp_path / "u.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["u.safetensors"]
    for fact in ("kind", "batch_size", "local_steps", "learning_rate", "optimizer", "momentum"):
        assert getattr(again, fact) == getattr(update, fact)
    assert again.weight_decay == 0.01 and again.sealed == {"c": "encrypted"}
    assert again.payloads == {"encryption": b"\x00\xff"}
    assert all(torch.equal(again.read(k), v) for k, v in update.tensors.items())


def facts(**changes):
    good = {
        "kind": "gradient", "batch_size": 1, "local_steps": 1, "learning_rate": None,
        "optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "sealed": {}, "payloads": [],
    }  # fmt: skip
    return json.dumps({**good, **changes})


@pytest.mark.parametrize(
    "header",
    [
        None,
        "no json",
        "[]",
        "{}",
        facts(batch_size=0),
        facts(batch_size="many"),
        facts(learning_rate=math.nan),
        facts(learning_rate="fast"),
        facts(sealed=None),
        facts(unknown=1),
    ],
)
def test_load_refuses_files_without_sound_facts(tmp_path, header):
    metadata = None if header is None else {"vitguard.update": header}
    save_file({"tensor:a": torch.ones(1)}, tmp_path / "u", metadata=metadata)
    with pytest.raises(InputError):
        Update.load(tmp_path / "u")


def test_load_refuses_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(InputError, match="no file"):
            Update.load(path)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.binary(max_size=200), st.booleans())
def test_load_of_arbitrary_bytes_raises_one_clear_error(tmp_path, content, header):
    path = tmp_path / "u"
    path.write_bytes((len(content).to_bytes(8, "little") if header else b"") + content)
    with pytest.raises(InputError):
        Update.load(path)


def test_view_reads_in_float64_and_knows_the_public_weights(small_vit, observe, photo):
    view = observe(small_vit(), photo, defenses="positions:kind=frozen")
    assert view.read("patch_embed.proj.weight").dtype == torch.float64
    assert view.weight("pos_embed").shape == (1, 17, 96)
    with pytest.raises(KeyError):
        view.weight("pos_embedding")


def test_view_gives_zeros_for_a_bias_that_is_not_there(small_vit, observe, photo):
    model = small_vit()
    model.blocks[0].mlp.fc1.bias = None
    view = observe(model, photo)
    assert torch.equal(view.bias("head"), model.head.bias.detach().double())
    missing = view.bias("blocks.0.mlp.fc1")
    assert missing.dtype == torch.float64
    assert missing.tolist() == [0.0] * len(model.blocks[0].mlp.fc1.weight)
    with pytest.raises(KeyError):
        view.bias("blocks.9.mlp.fc1")
