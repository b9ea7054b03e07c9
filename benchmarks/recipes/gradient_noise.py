"""Gradient noise: Gaussian noise on the update, without clipping."""

from recipes import Judged

JUDGED = Judged(
    title="Gradient noise",
    place="update",
    source="Zhu, Liu, Han, arXiv:1906.08935, section 5",
    claim="Noise of a large enough scale keeps deep leakage from the image, at a cost in accuracy.",
    rebuilt="`noise` of a tenth of each tensor's root mean square; no clipping, so no epsilon.",
    threat="The scale is public, the noise a secret draw.",
    stack="noise:scale=0.1",
    attack="map:seconds=20",
    found="",
    side=16,
    images=1,
)
