"""A stack that looks safe, since no position leaves, and is not."""

from vitguard.testing import assert_not_reconstructable


def test_frozen_positions_are_enough(vit, photos):
    assert_not_reconstructable(
        vit, photos[:1], defenses="positions:kind=frozen", attacks=["position", "span"]
    )
