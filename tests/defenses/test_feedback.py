"""Error feedback: nothing is lost, nothing is sent twice, nothing secret goes astray."""

import copy
import pickle
import threading
from dataclasses import replace

import pytest
import torch

from tests.conftest import small_vit
from vitguard.core import Update
from vitguard.defenses.batch_floor import BatchFloor
from vitguard.defenses.feedback import Feedback
from vitguard.defenses.low_rank import LowRankUpdate
from vitguard.errors import InputError, Unprotected
from vitguard.guard import protect

WEIGHT = "blocks.0.mlp.fc1.weight"


def guarded(*before, rank=1, feedback=True, **settings):
    model = small_vit(**settings)
    model.eval()
    return protect(model.train(), [*before, LowRankUpdate(rank, feedback=feedback)])


def update(guard, value=None, kind="difference", seed=0, name=WEIGHT):
    """Return what leaves of an update of one matrix."""
    shape = dict(guard.model.named_parameters())[name].shape
    made = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=made) if value is None else value
    facts = {"learning_rate": 0.1, "local_steps": 1} if kind == "difference" else {}
    return tensor, guard.seal(Update({name: tensor}, kind=kind, batch_size=4, **facts))


def kept(guard):
    return guard.state_dict().get("residuals", {}).get("low-rank", {}).get("tensors", {})


def test_updates_that_leave_and_what_is_kept_add_up_to_those_that_were_made():
    guard = guarded()
    made, sent = 0, 0
    for seed in range(5):
        whole, left = update(guard, seed=seed)
        assert torch.linalg.matrix_rank(left.tensors[WEIGHT], rtol=1e-4) == 1
        made, sent = made + whole, sent + left.tensors[WEIGHT]
        torch.testing.assert_close(sent + kept(guard)[WEIGHT], made, rtol=1e-4, atol=1e-4)


def test_without_feedback_nothing_is_kept_and_what_is_cut_is_lost():
    guard = guarded(feedback=False)
    first, second = (update(guard)[1].tensors[WEIGHT] for _ in range(2))
    assert torch.equal(first, second)
    assert "residuals" not in guard.state_dict()


def test_the_same_update_again_and_again_shows_more_directions_each_time():
    guard = guarded()
    total = 0
    for round_ in range(1, 5):
        total = total + update(guard)[1].tensors[WEIGHT]
        assert torch.linalg.matrix_rank(total, rtol=1e-4) >= min(round_, 2)
    assert torch.linalg.matrix_rank(total, rtol=1e-4) > 2


def test_an_update_that_is_refused_leaves_what_was_kept_as_it_was():
    guard = guarded()
    update(guard)
    before = kept(guard)[WEIGHT].clone()
    with pytest.raises(InputError):
        update(guard, torch.full_like(before, float("nan")))
    assert torch.equal(kept(guard)[WEIGHT], before)
    stopped = protect(small_vit().train(), [LowRankUpdate(1, feedback=True), BatchFloor(1e6)])
    for _ in range(2):
        with pytest.raises(Unprotected):
            update(stopped)
    assert not kept(stopped)


def test_a_residual_enters_one_update_whatever_threads_do():
    feedback, defense = Feedback(), LowRankUpdate(1, feedback=True)
    whole = Update({"w": torch.ones(2, 2)}, batch_size=1)
    with feedback.around() as passage:
        passage.keep(defense, whole, replace(whole, tensors={"w": torch.zeros(2, 2)}))
    seen, inside = [], threading.Barrier(2)

    def send():
        with feedback.around() as passage:
            inside.wait(10)
            seen.append(float(passage.fed(defense, whole).tensors["w"].sum()))
            inside.wait(10)

    threads = [threading.Thread(target=send) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == [4.0, 8.0]


def test_what_two_threads_keep_is_added_up():
    feedback, defense = Feedback(), LowRankUpdate(1, feedback=True)
    whole = Update({"w": torch.ones(2, 2)}, batch_size=1)
    none = replace(whole, tensors={"w": torch.zeros(2, 2)})
    with feedback.around() as first, feedback.around() as second:
        first.keep(defense, whole, none)
        second.keep(defense, whole, none)
    assert float(feedback.state_dict()["low-rank"]["tensors"]["w"].sum()) == 8.0


def test_a_run_goes_on_from_its_state_as_if_it_had_not_stopped():
    whole, again = guarded(), guarded()
    update(whole)
    for state in (whole.state_dict(), None):
        if state is None:
            again.load_state_bytes(whole.state_bytes())
        else:
            again.load_state_dict(copy.deepcopy(state))
        assert torch.equal(kept(again)[WEIGHT], kept(whole)[WEIGHT])
    assert torch.equal(
        update(whole, seed=1)[1].tensors[WEIGHT], update(again, seed=1)[1].tensors[WEIGHT]
    )


def test_what_is_kept_is_in_no_copy_pickle_weights_or_state_without_secrets():
    guard = guarded()
    update(guard)
    secret = kept(guard)[WEIGHT].flatten()[:4].numpy().tobytes()
    assert secret not in pickle.dumps(guard.model)
    assert not copy.deepcopy(guard.model).vitguard.feedback
    assert not any("residual" in n or "feedback" in n for n in guard.model.state_dict())
    with pytest.raises(InputError, match="without secrets"):
        guard.state_bytes(draws=False)
    assert "tensors" not in repr(guard.model.vitguard.feedback.take("low-rank"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "gradient"}, "a difference, as before"),
        ({"name": "blocks.0.attn.proj.weight"}, "of shape"),
    ],
)
def test_an_update_of_another_kind_or_other_tensors_is_refused_until_residuals_are_forgotten(
    change, said
):
    guard = guarded()
    update(guard)
    with pytest.raises(InputError, match=said):
        update(guard, **change)
    assert WEIGHT in kept(guard)
    guard.forget_residuals()
    assert not kept(guard)
    update(guard, **change)


def test_a_round_that_is_repeated_or_left_out_is_refused_until_residuals_are_forgotten():
    guard = guarded()
    with guard.round(3, base="start"):
        update(guard)
    with guard.round(5, base="later"):
        update(guard)
    for number in (5, 2):
        with guard.round(number, base="start"), pytest.raises(InputError, match="after 5"):
            update(guard)
    with pytest.raises(InputError, match="no round"):
        update(guard)
    guard.forget_residuals()
    with guard.round(2, base="start"):
        update(guard)


@pytest.mark.parametrize(
    "state",
    [
        {"low-rank": {"kind": "difference", "round": 0, "tensors": {"w": "text"}}},
        {"low-rank": {"kind": "other", "round": 0, "tensors": {}}},
        {"low-rank": 3},
        {"sign-update": {"kind": "difference", "round": 0, "tensors": {}}},
        {
            "low-rank": {
                "kind": "gradient",
                "round": 0,
                "tensors": {"w": torch.tensor(float("nan"))},
            }
        },
    ],
)
def test_residuals_that_are_something_else_or_of_another_stack_are_refused_and_change_nothing(
    state,
):
    guard = guarded()
    update(guard)
    before = kept(guard)[WEIGHT].clone()
    with pytest.raises(InputError):
        guard.load_state_dict({**guard.state_dict(), "residuals": state})
    assert torch.equal(kept(guard)[WEIGHT], before)


def test_a_report_says_that_feedback_shows_more_with_each_update():
    assert "more directions" in LowRankUpdate(2, feedback=True).audit_note()
    assert LowRankUpdate(2).audit_note() == ""
    assert LowRankUpdate(2, feedback=True).spec() == "low-rank:feedback=true"


@pytest.mark.slow
def test_many_updates_on_the_same_images_show_the_whole_gradient():
    guard = guarded()
    shape = dict(guard.model.named_parameters())[WEIGHT].shape
    made = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = made[:, :6] @ torch.randn(6, shape[1], generator=torch.Generator().manual_seed(1))
    total, errors = 0, []
    for count in range(1, 61):
        total = total + update(guard, made)[1].tensors[WEIGHT]
        errors.append(float((total / count - made).norm() / made.norm()))
    assert errors[0] > 0.5 and errors[59] < 0.1 and errors[59] < errors[19] / 2
