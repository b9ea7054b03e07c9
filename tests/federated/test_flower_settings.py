"""What a user may not call a setting of a run: the names that the strategies say things by."""

import pytest

pytest.importorskip("flwr", reason="needs vitguard[flower]")

from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping

from tests.federated.flower_rounds import Federated
from tests.federated.masked_rounds import Masked
from vitguard.errors import InputError
from vitguard.federated.flower.adding import CLIPPED
from vitguard.federated.flower.ledgers import LEDGER
from vitguard.federated.flower.masked_client import ASKED, BODY, PHASE
from vitguard.federated.flower.records import BASE, ROUND, RUN, SNAPSHOT, VOUCH, WEIGHTED

BOTH = pytest.mark.parametrize("kind", [Federated, Masked])
SAID = [ROUND, BASE, RUN, SNAPSHOT, WEIGHTED, VOUCH, PHASE, BODY]


@BOTH
def test_a_setting_with_a_name_of_ours_is_refused_before_anything_is_sent(small_vit, kind):
    """Every client would take it for the strategy's own word, and refuse."""
    federated = kind(small_vit)
    strategy, arrays = federated.strategy(fraction_evaluate=1.0), ArrayRecord(federated.start)
    for name in SAID:
        config = ConfigRecord({name: "send"})
        for given in ("train_config", "evaluate_config"):
            with pytest.raises(InputError, match=f"{given} .*{name}.*[Rr]ename"):
                strategy.start(federated.grid, arrays, num_rounds=1, **{given: config})
        with pytest.raises(InputError, match=name):  # by its place
            strategy.start(federated.grid, arrays, 1, 60.0, config)
    assert not federated.grid.sent and not federated.seen


def test_a_setting_under_a_strategy_around_masks_is_refused_before_anything_is_sent(small_vit):
    masked = Masked(small_vit)
    inner = masked.strategy(wrapped=True)
    outer = DifferentialPrivacyClientSideFixedClipping(inner, 1e-6, 1.0, 6)
    config = ConfigRecord({PHASE: "keys"})
    with pytest.raises(InputError, match=PHASE):
        outer.start(masked.grid, ArrayRecord(masked.start), num_rounds=1, train_config=config)
    assert not masked.grid.sent


@BOTH
def test_a_record_with_a_name_of_ours_is_refused_when_the_strategy_is_made(small_vit, kind):
    """The strategy's own record would stand in its place, or the mod take it out."""
    federated = kind(small_vit)
    for name in (ASKED, LEDGER, CLIPPED):
        for key in ("configrecord_key", "arrayrecord_key", "weighted_by_key"):
            with pytest.raises(InputError, match=f"{key}.*{name!r}"):
                federated.strategy(**{key: name})


@BOTH
def test_settings_of_the_users_own_reach_the_clients(small_vit, kind):
    federated = kind(small_vit)
    config = ConfigRecord({"lr": 0.5, "my-vitguard-round": 3})
    strategy = federated.strategy()
    arrays = ArrayRecord(federated.start)
    strategy.start(federated.grid, arrays, num_rounds=1, train_config=config)
    assert strategy.refused == {1: {}} and federated.seen
