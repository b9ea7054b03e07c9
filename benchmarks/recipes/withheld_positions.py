"""Withheld position gradients: learnable positions whose gradient is not shared."""

from recipes import Judged

JUDGED = Judged(
    title="Position gradient not shared",
    place="positions",
    source="Lu et al., arXiv:2112.14087 (APRIL)",
    claim="Closing the sharing of the position embedding's gradient defeats the attack.",
    rebuilt="`withheld`, in the first round.",
    threat="Positions before the step are public, as in a first round; they drift slowly after it.",
    stack="withheld",
    attack="ladder:seconds=30",
    found="The attack that it was proposed against is gone; `span` solves for every patch from the "
    "span of the first block's inputs instead.",
)
