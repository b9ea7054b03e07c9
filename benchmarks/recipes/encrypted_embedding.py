"""Encrypted embedding: patch and position embedding under a key of the clients."""

from recipes import Judged

JUDGED = Judged(
    title="Encrypted embedding",
    place="keys",
    source="Aso, Shiota, Kiya, arXiv:2308.00271",
    claim="With the embedding of the model encrypted by a random sequence, a server cannot restore "
    "images, and accuracy stays.",
    rebuilt="`encryption` of patch, position and class-token gradients: whatever the sequence does "
    "to them, they are taken as unreadable. The abstract was read, the scheme's details were not.",
    threat="The key is shared by the clients and unknown to the server, which knows the weights "
    "before the step, as in the first round of fine-tuning a public checkpoint. A client that "
    "works with the server gives it the key.",
    stack="encryption:select=embedding,force=true",
    attack="ladder:seconds=30",
    found="`span` reads the image off the gradients of the first block, which stay plain, without "
    "any tensor of the embedding.",
)
