"""Fixed positions: the embedding of the checkpoint, or sines and cosines, and no gradient of it."""

from recipes import Judged

JUDGED = Judged(
    title="Fixed sine-cosine positions",
    place="positions",
    source="positions of He et al., arXiv:2111.06377; as a defense in arXiv:2601.12051 (unchecked)",
    claim="Without a position gradient the closed forms of APRIL have nothing to solve.",
    rebuilt="`positions` of the kind `sincos`, which span few dimensions.",
    threat="Positions are public.",
    stack="positions:kind=sincos",
    attack="ladder:seconds=30",
    found="The inputs of the first block lie in the row space of its gradients, and the MLP of "
    "that block tells the true tokens in it: `gelu-span` needs no position gradient.",
    images=2,
)
