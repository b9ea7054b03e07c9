"""Class-token encryption: CKKS for the class token alone."""

from recipes import Judged

JUDGED = Judged(
    title="Class token under CKKS",
    place="keys",
    source="Amin et al., arXiv:2511.20983",
    claim="Encrypting the class token alone prevents model inversion, at a thirtieth of the cost "
    "of encrypting gradients.",
    rebuilt="An update whose class-token tensor alone is encrypted. In the paper clients send "
    "encrypted class tokens and no gradient: against the server that is full encryption, and "
    "nothing here attacks it. The row is of those who take it for a defense of gradients.",
    threat="The key is unknown. In the paper's scheme, who has the key reads the class token of "
    "every image.",
    stack="encryption:select=token,force=true",
    attack="ladder:seconds=30",
    found="The class token's gradient was never needed: `position` reads the rest.",
)
