"""MJP: masked jigsaw puzzle of position embeddings."""

from recipes import Judged

JUDGED = Judged(
    title="Masked jigsaw puzzle (MJP)",
    place="positions",
    source="Ren et al., arXiv:2205.12551; Unified MJP, arXiv:2601.12051",
    claim="Shuffling patches and hiding their positions behind one unknown embedding breaks the "
    "chain of gradient leakage and improves accuracy.",
    rebuilt="`shuffle` at ratio 0.7, block-wise masks, learnable positions.",
    threat="Mask and permutation are secret draws.",
    stack="shuffle:ratio=0.7",
    attack="ladder:seconds=30",
    found="Rows of zeros in the position gradient tell the mask; `gelu-span` then proves every "
    "shuffled patch, so that only the order inside the mask is hidden.",
    images=2,
)
