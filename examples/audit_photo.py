"""Audit one photo against three configurations and keep the pictures.

    python examples/audit_photo.py [--model vit_base_patch16_224] [--out result.png]

Makes the picture at the top of the README.
"""

from __future__ import annotations

import argparse

import vitguard as vg
from vitguard import data
from vitguard.models import build_model
from vitguard.vit import Anatomy


def main() -> None:
    """Run the audit, print the table and save the report in the form its suffix names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--out", default="result.png", help=".png, .html, .md or .json")
    options = parser.parse_args()
    model = build_model(options.model)
    anatomy = Anatomy.of(model)
    photo = data.sample_images(anatomy.image_size, count=1)
    report = vg.audit(
        model,
        (photo.pixels, data.assign_labels(1, anatomy.classes)),
        defenses={
            "positions:kind=frozen": [vg.FixedPositions("frozen")],
            "positions:kind=sincos": [vg.FixedPositions("sincos")],
        },
        attacks=["span"],
        names=photo.names,
        model_name=options.model,
        weights="random initialisation",
    )
    print(report.to_markdown())
    report.save(options.out)


if __name__ == "__main__":
    main()
