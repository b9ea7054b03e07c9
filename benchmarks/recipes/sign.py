"""Sign updates: one bit of each entry."""

from recipes import Judged

JUDGED = Judged(
    title="Sign update (signSGD)",
    place="update",
    source="Bernstein et al., arXiv:1802.04434; as a defense in surveys",
    claim="One bit of each entry carries too little for an inversion.",
    rebuilt="`sign-update`: the sign of each entry and one size for each tensor.",
    threat="Nothing is secret.",
    stack="sign-update",
    attack="map:seconds=20",
    found="Bits of hundreds of thousands of entries are more than 768 pixels hold; how many of "
    "them `map` can use is what the number says.",
    side=16,
    images=1,
)
