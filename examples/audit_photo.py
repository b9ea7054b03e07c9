"""Audit one photo against three configurations and keep the pictures.

    python examples/audit_photo.py [--model NAME] [--checkpoint FILE] [--out result.png]

Makes the picture at the top of the README, there with the weights of DINOv2-small:

    python examples/audit_photo.py --checkpoint dinov2_small.safetensors \
        --model vit_small_patch14_dinov2:img_size=112,num_classes=10
"""

from __future__ import annotations

import argparse

import vitguard as vg
from vitguard import data
from vitguard.models import build_model, load_checkpoint, normalization_of
from vitguard.vit import Anatomy


def main() -> None:
    """Run the audit, print the table and save the report in the form its suffix names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--checkpoint", help="weights of the model; drawn at random without")
    parser.add_argument("--out", default="result.png", help=".png, .html, .md or .json")
    options = parser.parse_args()
    model = build_model(options.model)
    weights = "random initialisation"
    if options.checkpoint:
        notes = load_checkpoint(model, options.checkpoint)
        weights = "; ".join(("pretrained", *notes))
    anatomy = Anatomy.of(model)
    photo = data.sample_images(anatomy.image_size, count=1)
    report = vg.audit(
        model,
        (photo.pixels, data.assign_labels(1, anatomy.classes)),
        defenses={
            "positions:kind=frozen": [vg.FixedPositions("frozen")],
            "privacy at epsilon 8": [vg.DifferentialPrivacy(epsilon=8.0, epochs=3)],
        },
        attacks=["ladder"],
        normalization=normalization_of(model),
        names=photo.names,
        model_name=options.model,
        weights=weights,
    )
    print(report.to_markdown())
    report.save(options.out)


if __name__ == "__main__":
    main()
