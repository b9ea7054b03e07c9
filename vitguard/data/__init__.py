"""Images to audit with: scikit-image's sample photos, image files and folders, and decoys.

Pixels are float32 in [0, 1], shape (images, 3, height, width). Nothing is ever downloaded: the
sample photos are read from the installed scikit-image package itself.
"""

from vitguard.data.decoy_images import decoys
from vitguard.data.image_sets import (
    ImageSet,
    assign_labels,
    check_labels,
    count_images,
    load_images,
)
from vitguard.data.photos import SAMPLE_NAMES, sample_images, sample_photos
from vitguard.data.pixels import copies_note, faint_note, mean_image, pictured, with_channels

__all__ = [
    "SAMPLE_NAMES",
    "ImageSet",
    "assign_labels",
    "check_labels",
    "copies_note",
    "count_images",
    "decoys",
    "faint_note",
    "load_images",
    "mean_image",
    "pictured",
    "sample_images",
    "sample_photos",
    "with_channels",
]
