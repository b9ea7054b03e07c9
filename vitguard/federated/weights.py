"""What a client's weight in the average says of its training."""

from __future__ import annotations

__all__ = ["images_behind"]


def images_behind(weight: float) -> int:
    """Return how many images stand behind an update of this weight: never more than there are.

    Args:
        weight: What the client states, its number of images by the frameworks' convention.

    Returns:
        The weight where it is a whole number of images, else 1: a floor then refuses.
    """
    return int(weight) if weight >= 1 and float(weight).is_integer() else 1
