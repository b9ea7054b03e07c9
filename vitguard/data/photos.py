"""The sample photos: they lie inside the installed scikit-image, nothing is downloaded."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from vitguard.data.image_sets import ImageSet, load_images
from vitguard.data.pixels import read_image
from vitguard.errors import missing_extra

__all__ = ["PHOTOS", "SAMPLE_NAMES", "photo_folder", "sample_images", "sample_photos"]

# Public domain, CC0 or without known restrictions, and inside the wheel.
PHOTOS = {
    "astronaut": "astronaut.png",
    "chelsea": "chelsea.png",
    "coffee": "coffee.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "hubble_deep_field": "hubble_deep_field.jpg",
    "ihc": "ihc.png",
}
SAMPLE_NAMES = tuple(PHOTOS)
"""Names of the sample photos, in the order in which `sample_images` takes them."""


def sample_photos() -> dict[str, Image.Image]:
    """Return the sample photos inside the installed scikit-image, name -> RGB image.

    Raises:
        MissingExtra: scikit-image is not installed.
    """
    return {name: read_image(photo_folder() / file) for name, file in PHOTOS.items()}


def sample_images(
    size: tuple[int, int], *, count: int | None = None, classes: int | None = None
) -> ImageSet:
    """Return the first `count` sample photos as `load_images` would."""
    paths = [photo_folder() / file for file in PHOTOS.values()]
    return load_images(paths, size, count=count, classes=classes)


def photo_folder() -> Path:
    # Found without importing it: scikit-image's data module would bring in its downloader.
    spec = find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise missing_extra("The sample photos", "scikit-image")
    return Path(spec.submodule_search_locations[0]) / "data"
