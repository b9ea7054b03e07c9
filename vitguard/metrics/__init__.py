"""How close a guess is to the truth, beside what no information at all would score.

Images are pixels in [0, 1], shape (batch, channels, height, width). A guess outside [0, 1] is
clamped, as any viewer would; truth outside [0, 1] and values that are not finite raise
`InputError`. Everything is computed in float64 on the CPU, and no result is NaN or infinite: PSNR
is capped at `PSNR_CAP`.
Definitions: docs/methods.md 5. SSIM: Wang et al. 2004, as scikit-image computes it.
"""

from vitguard.metrics.checked import PSNR_CAP
from vitguard.metrics.identify import RIVALS, identification, identification_p
from vitguard.metrics.pairs import fft2d, lpips, mse, patch_psnr, psnr, ssim
from vitguard.metrics.scoring import (
    RECOVERED,
    MaskScore,
    Scores,
    best_assignment,
    mask_score,
    recovered,
    score,
)
from vitguard.metrics.uninformed import Baseline, baseline

__all__ = [
    "PSNR_CAP",
    "RECOVERED",
    "RIVALS",
    "Baseline",
    "MaskScore",
    "Scores",
    "baseline",
    "best_assignment",
    "fft2d",
    "identification",
    "identification_p",
    "lpips",
    "mask_score",
    "mse",
    "patch_psnr",
    "psnr",
    "recovered",
    "score",
    "ssim",
]
