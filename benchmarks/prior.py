"""The numbers of the natural-image prior, computed anew from openly licensed photos.

    python benchmarks/prior.py [--size PIXELS] [--crops N]

The photos come with packages of the development set and are none that an audit takes for a victim:
the sample photos of `vitguard.data` are left out. In colour: Grace Hopper (matplotlib; public
domain, US government), the motorcycle (scikit-image; Middlebury stereo data, Scharstein et al.
2014) and two photos of scikit-learn (CC BY 2.0, danielbuechele and vultilion). In grey, for the
spectrum only: six photos of scikit-image (CC0, its data/README.txt).

Square crops of all scales are reduced to `--size` pixels. Printed are the grey mean, the standard
deviations of brightness, red-blue and green-magenta, and the exponent and knee of the power
1 / (knee^2 + cycles^2)^(exponent / 2) in the cosine basis: averages of logarithms over photos, so
that one yellow flower does not decide. They stand in
`vitguard/attacks/robust/natural_images.py`.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.fft import dctn
from scipy.optimize import least_squares

COLOUR = {
    "matplotlib": ["mpl-data/sample_data/grace_hopper.jpg"],
    "skimage": ["data/motorcycle_left.png"],
    "sklearn": ["datasets/images/china.jpg", "datasets/images/flower.jpg"],
}
GREY = [f"data/{name}.png" for name in ("camera", "coins", "grass", "gravel", "brick", "moon")]
AXES = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])


def main() -> None:
    """Print the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--crops", type=int, default=1000)
    options = parser.parse_args()
    random = np.random.default_rng(0)
    colour = [folder(name) / file for name, files in COLOUR.items() for file in files]
    grey = [folder("skimage") / file for file in GREY]
    sets = [crops(path, options.crops, options.size, random) for path in colour + grey]
    mean = float(np.mean([images.mean() for images in sets]))
    spreads = []
    for images in sets[: len(colour)]:
        along = (images - mean) @ AXES.T
        spreads.append(np.log(along.std(axis=(0, 1, 2))))
    waves = [np.log((dctn((s - mean) @ AXES[0], axes=(1, 2), norm="ortho") ** 2).mean(0))
             for s in sets]  # fmt: skip
    exponent, knee = power_law(np.mean(waves, axis=0))
    print(f"mean {mean:.3f}")
    print("deviations", " ".join(f"{v:.3f}" for v in np.exp(np.mean(spreads, axis=0))))
    print(f"exponent {exponent:.2f}, knee {knee:.2f} cycles")


def folder(package: str) -> Path:
    """Return where an installed package lies."""
    found = find_spec(package)
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


def crops(path: Path, count: int, size: int, random: np.random.Generator) -> np.ndarray:
    """Return random squares of a photo at random scales, (count, size, size, 3) in [0, 1]."""
    photo = Image.open(path).convert("RGB")
    width, height = photo.size
    made = []
    for _ in range(count):
        side = int(np.exp(random.uniform(np.log(2 * size), np.log(min(width, height)))))
        left, top = random.integers(0, width - side + 1), random.integers(0, height - side + 1)
        square = photo.crop((left, top, left + side, top + side))
        made.append(np.asarray(square.resize((size, size), Image.Resampling.BICUBIC)))
    return np.stack(made) / 255


def power_law(logs: np.ndarray) -> tuple[float, float]:
    """Return exponent and knee that fit a logarithmic power spectrum, octaves weighted alike."""
    at = np.arange(len(logs), dtype=float)
    cycles = at[:, None] ** 2 + at[None] ** 2
    weight = 1 / np.sqrt(1 + cycles)

    def missed(known: np.ndarray) -> np.ndarray:
        size, exponent, knee = known
        return (weight * (logs - size + exponent / 2 * np.log(np.exp(knee) ** 2 + cycles))).ravel()

    _, exponent, knee = least_squares(missed, [0.0, 2.0, 0.0]).x
    return float(exponent), float(np.exp(knee))


if __name__ == "__main__":
    main()
