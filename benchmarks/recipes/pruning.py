"""Gradient pruning: the largest entries of each tensor."""

from recipes import Judged

JUDGED = Judged(
    title="Gradient pruning",
    place="update",
    source="Zhu, Liu, Han, arXiv:1906.08935, section 5",
    claim="From 20 % of zeroed entries on, deep leakage no longer gives the image.",
    rebuilt="`pruning` that keeps 50 % of each tensor: more is zeroed than the paper asks for.",
    threat="Zeros show which entries were zeroed.",
    stack="pruning:keep=0.5",
    attack="map:seconds=20",
    found="",
    side=16,
    images=1,
)
