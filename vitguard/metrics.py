"""How close a guess is to the truth, beside what no information at all would score.

Images are pixels in [0, 1], shape (batch, channels, height, width). A guess outside [0, 1] is
clamped, as any viewer would; truth outside [0, 1] and values that are not finite raise
`InputError`. Everything is computed in float64 on the CPU, and no result is NaN or infinite: PSNR
is capped at `PSNR_CAP`.
Definitions: docs/methods.md 5. SSIM: Wang et al. 2004, as scikit-image computes it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from scipy.special import bdtrc
from torch import Tensor
from torch.nn import functional

from vitguard.errors import expected

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

PSNR_CAP = 200.0
"""Decibels at which PSNR stops: a mean squared error of 1e-20, below what float64 pixels carry."""
_SAME = 0.9  # correlation from which two images show the same
RIVALS = 199
"""Sets of guesses without information beside which a truth must stand out further."""
RECOVERED = 30.0
"""Decibels from which one patch counts as recovered: errors of 3 % of the pixel range."""
_ABOVE_FLAT = 6.0

Images = Float[Tensor, "batch channels height width"]
Guesses = Float[Tensor, "guesses channels height width"]
Decoys = Float[Tensor, "decoys channels height width"]
Uninformed = Float[Tensor, "uninformed channels height width"]
PerImage = Float[Tensor, " batch"]
Perceptual = Callable[[Tensor, Tensor], Tensor]

_SSIM_WINDOW, _SSIM_SIGMA = 11, 1.5
_SSIM_C1, _SSIM_C2 = 0.01**2, 0.03**2


def mse(guess: Images, truth: Images) -> PerImage:
    """Return the mean squared error of each image."""
    guess, truth = _pair(guess, truth)
    return (guess - truth).square().flatten(1).mean(1)


def psnr(guess: Images, truth: Images) -> PerImage:
    """Return -10 log10(MSE) of each image, in dB, at most `PSNR_CAP`."""
    return _decibels(mse(guess, truth))


def patch_psnr(guess: Images, truth: Images, patch_size: tuple[int, int]) -> PerImage:
    """Return each image's PSNR in dB after the best one-to-one move of whole patches.

    Moving pieces around must not count as protection, so this is never below `psnr`.

    Args:
        guess: Pixels in [0, 1].
        truth: Pixels in [0, 1], same shape.
        patch_size: (height, width) of a patch in pixels; must divide the image.
    """
    guess, truth = _pair(guess, truth)
    pieces = zip(_patches(guess, patch_size), _patches(truth, patch_size), strict=True)
    matched = _decibels(torch.stack([_matched_mse(g, t) for g, t in pieces]))
    return torch.maximum(matched, psnr(guess, truth))  # equal but for rounding where none moved


def ssim(guess: Images, truth: Images) -> PerImage:
    """Return each image's mean structural similarity, in [-1, 1].

    Gaussian window of 11 x 11 with standard deviation 1.5, data range 1, population covariance,
    only windows that lie inside the image, mean over channels. Under 11 pixels the window shrinks
    to the largest odd size that fits.
    """
    guess, truth = _pair(guess, truth)
    size = min(_SSIM_WINDOW, *truth.shape[-2:])
    offsets = torch.arange(size - (size + 1) % 2, dtype=torch.float64)
    weights = torch.exp(-0.5 * ((offsets - offsets.mean()) / _SSIM_SIGMA).square())
    weights = weights / weights.sum()

    def smooth(values: Tensor) -> Tensor:
        flat = values.flatten(0, 1)[:, None]
        return functional.conv2d(
            functional.conv2d(flat, weights[None, None, :, None]), weights[None, None, None, :]
        ).view(*values.shape[:2], -1)

    mean_g, mean_t = smooth(guess), smooth(truth)
    var_g = smooth(guess.square()) - mean_g.square()
    var_t = smooth(truth.square()) - mean_t.square()
    covariance = smooth(guess * truth) - mean_g * mean_t
    luminance = (2 * mean_g * mean_t + _SSIM_C1) / (mean_g.square() + mean_t.square() + _SSIM_C1)
    structure = (2 * covariance + _SSIM_C2) / (var_g + var_t + _SSIM_C2)
    return (luminance * structure).flatten(1).mean(1)


def fft2d(guess: Images, truth: Images) -> PerImage:
    """Return 1 - cosine of the magnitude spectra of each image, in [0, 1]; 0 is the same spectrum.

    Spectra are 2-D per channel, without the zero frequency. A constant image has no spectrum: it is
    at distance 1 from everything but another constant image.
    """
    guess, truth = _pair(guess, truth)
    a, b = _spectrum(guess), _spectrum(truth)
    norms = a.norm(dim=1) * b.norm(dim=1)
    cosine = (a * b).sum(1) / norms.clamp(min=torch.finfo(norms.dtype).tiny)
    both_constant = (a == 0).all(1) & (b == 0).all(1)
    return torch.where(both_constant, 0.0, (1 - cosine).clamp(0, 1))


def lpips(guess: Images, truth: Images, model: Perceptual) -> PerImage:
    """Return the learned perceptual distance of each image under the caller's `model`.

    Args:
        guess: Pixels in [0, 1].
        truth: Pixels in [0, 1], same shape.
        model: Takes two float32 batches in [-1, 1] and returns one distance per image, as
            `lpips.LPIPS` does. Nothing is ever downloaded here.
    """
    guess, truth = _pair(guess, truth)
    with torch.no_grad():
        distance = model(guess.float() * 2 - 1, truth.float() * 2 - 1)
    if distance.numel() != len(truth) or not distance.isfinite().all():
        raise expected(f"{len(truth)} finite distances from the LPIPS model", tuple(distance.shape))
    return distance.detach().flatten().to("cpu", torch.float64)


def best_assignment(quality: Float[Tensor, "guesses truths"]) -> Int[Tensor, " truths"]:
    """Return the index of the guess assigned to each truth, with the largest summed quality.

    One-to-one where there are enough guesses. With fewer guesses than truths, each remaining truth
    takes its best guess; with more, some guesses stay unused.
    """
    rows, columns = linear_sum_assignment(quality.numpy(), maximize=True)
    chosen = quality.argmax(0)
    chosen[torch.as_tensor(columns)] = torch.as_tensor(rows)
    return chosen


def identification(
    guess: Guesses, truth: Images, decoys: Decoys, uninformed: Uninformed | None = None
) -> Bool[Tensor, " batch"]:
    """Return whether each truth is more like the guesses than every decoy is.

    Similarity is the Pearson correlation after the mean of each channel is removed, so a constant
    guess identifies nothing. With several guesses the most similar one counts, for the truth and
    for each decoy alike: choosing the guess by the truth would lift noise above chance. Chance is
    1 / (decoys + 1) where truth and decoys have the same distribution.

    They seldom have: a mean image or smooth noise picks some truths out of decoys of another data
    set.
    With `uninformed`, a truth must also stand out further than it does to any of `RIVALS` sets of
    such guesses, as many in a set as there are guesses: chance is then at most 1 / (RIVALS + 1).

    Args:
        guess: Pixels in [0, 1], any number of guesses.
        truth: Pixels in [0, 1].
        decoys: Pixels in [0, 1]: other images. One that shows a truth (correlation above 0.9) does
            not stand beside it.
        uninformed: Images made without the truth; one that equals a decoy is not compared with it.
    """
    guess, truth = _images(guess, "guess"), _images(truth, "truth", strict=True)
    _same_shape(guess, truth, "a guess")
    _same_shape(decoys, truth, "decoys")
    sets = _standardized(guess)[None]
    rows = _standardized(truth)
    same = _correlations(rows, decoys) > _SAME
    margin = _margins(_correlations(sets[0], decoys)[None], (sets[0] @ rows.T)[None], same)
    told = margin[0] > 1e-9
    if uninformed is None or not bool(told.any()):
        return told
    nulls = _standardized(_images(uninformed, "a guess without information", strict=True))
    to_decoys = _correlations(nulls, decoys)
    itself = to_decoys > _SAME
    to_decoys = torch.where(itself, to_decoys.masked_fill(itself, 0).mean(1, True), to_decoys)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(nulls), (RIVALS, len(guess)), generator=generator)
    drawn[:, 0] = torch.arange(RIVALS) % len(nulls)  # each of them has its turn
    to_truths = nulls @ rows.T
    lucky = torch.cat([_margins(to_decoys[d], to_truths[d], same) for d in drawn.split(16)])
    return told & (margin[0] > lucky.amax(0))


def _correlations(rows: Tensor, decoys: Decoys) -> Tensor:
    """Return the correlation of standardised rows with each decoy, shape (rows, decoys)."""
    # A few decoys at a time: a thousand large ones in float64 would be the audit's peak memory.
    few_at_once = max(1, 600_000 // decoys[0].numel())
    parts = decoys.split(few_at_once)
    every = [rows @ _standardized(_images(few, "decoys", strict=True)).T for few in parts]
    return torch.cat(every, dim=1)


def _margins(
    decoys: Float[Tensor, "sets guesses decoys"],
    truths: Float[Tensor, "sets guesses truths"],
    same: Bool[Tensor, "truths decoys"],
) -> Float[Tensor, "sets truths"]:
    """Return how much further each truth stands out, to any guess of a set, than any decoy."""
    margins = []
    for own, left_out in zip(truths.unbind(-1), same, strict=True):
        line_up = torch.cat([decoys[..., ~left_out], own[..., None]], dim=-1)
        # A clear guess is like everything natural, a noisy one like nothing: compare each on its
        # own scale. The scales of few decoys are chance themselves, hence the common part. Truth
        # and decoys enter alike: without information each is equally likely to come first.
        spread = line_up.std(-1, correction=0, keepdim=True)
        common = spread.square().mean(1, keepdim=True).sqrt()
        scale = (spread + common / (line_up.shape[-1] - 1) ** 0.5).clamp(min=1e-12)
        stands = ((line_up - line_up.mean(-1, keepdim=True)) / scale).amax(1)
        margins.append(stands[:, -1] - stands[:, :-1].amax(-1))
    return torch.stack(margins, dim=-1)


def identification_p(hits: int, trials: int, decoys: int) -> float:
    """Return the chance of `hits` or more identifications in `trials` by guessing.

    Each trial hits with probability 1 / (decoys + 1); binomial tail.
    """
    if not (0 <= hits <= trials and decoys >= 1):
        raise expected(
            "0 <= hits <= trials and a decoy or more", f"{hits} of {trials}, {decoys} decoys"
        )
    return float(bdtrc(hits - 1, trials, 1 / (decoys + 1))) if hits else 1.0


@dataclass(frozen=True, eq=False)
class Baseline:
    """What guesses made without the update score, in dB per image.

    Args:
        psnr: The best of the guesses without information.
        patch_psnr: The same, patches matched.
        thumbnail: Every patch flat in its own mean colour. It knows something: the image at one
            pixel a patch. No other order of flat patches is closer, so that matching adds nothing.
    """

    psnr: PerImage
    patch_psnr: PerImage
    thumbnail: PerImage


def baseline(
    truth: Images, patch_size: tuple[int, int], guesses: Guesses | None = None
) -> Baseline:
    """Score guesses without information, and the thumbnail: without them a number means nothing.

    Of the guesses the luckiest one counts, for each image and for each score. One flat colour is
    always among them: black, white, grey, and each channel off or on.

    Args:
        truth: Pixels in [0, 1].
        patch_size: (height, width) of a patch in pixels.
        guesses: Further images that were made without the truth, shaped like it.
    """
    truth = _images(truth, "truth", strict=True)
    flat_ones = _public_colours(truth)
    if guesses is None:
        guesses = flat_ones
    else:
        guesses = _images(guesses, "a guess without information", strict=True)
        _same_shape(guesses, truth, "a guess without information")
        guesses = torch.cat([flat_ones, guesses])
    patches = _patches(truth, patch_size)
    flat = (patches - patches.mean(-1, keepdim=True)).square().flatten(1).mean(1)
    raw = torch.stack([psnr(guess.expand_as(truth), truth) for guess in guesses]).amax(0)
    pieces = _patches(guesses, patch_size)
    matched = torch.stack([_best_matched(one, pieces) for one in patches])
    return Baseline(raw, torch.maximum(raw, matched), _decibels(flat))


def _public_colours(truth: Images) -> Guesses:
    """Return flat images of the colours that anyone would try."""
    channels = truth.shape[1]
    corners = itertools.product((0.0, 1.0), repeat=channels) if channels <= 4 else ()
    levels = [[v] * channels for v in (0.0, 0.25, 0.5, 0.75, 1.0)]
    colours = torch.tensor([*levels, *map(list, corners)], dtype=truth.dtype)
    return colours[:, :, None, None].expand(-1, -1, *truth.shape[2:])


def _best_matched(
    truth: Float[Tensor, "patches ..."], guesses: Float[Tensor, "guesses patches ..."]
) -> Float[Tensor, ""]:
    """Return the dB of the guess whose patches match those of `truth` best.

    Assigning hundreds of patches takes long: a guess whose nearest patches are no closer than the
    best assignment so far is left out.
    """
    hoped = torch.stack([_decibels(_nearest_mse(guess, truth)) for guess in guesses])
    best = torch.tensor(-torch.inf, dtype=torch.float64)
    for i in hoped.argsort(descending=True).tolist():
        if hoped[i] <= best:
            break
        best = torch.maximum(best, _decibels(_matched_mse(guesses[i], truth)))
    return best


@dataclass(frozen=True)
class MaskScore:
    """How well shuffled positions were found; None where it is undefined (nothing to divide by)."""

    precision: float | None
    recall: float | None


def mask_score(
    inferred: Bool[Tensor, "guesses patches"],
    true: Bool[Tensor, "batch patches"],
    assignment: Sequence[int] | Int[Tensor, " batch"],
) -> MaskScore:
    """Compare inferred masks with the true ones, image by image under `assignment`, pooled."""
    chosen = inferred.detach().cpu().bool()[torch.as_tensor(assignment, dtype=torch.long)]
    true = true.detach().cpu().bool()
    if chosen.shape != true.shape:
        raise expected(f"masks of shape {tuple(true.shape)}", tuple(chosen.shape))
    both, said, there = (int(m.sum()) for m in (chosen & true, chosen, true))
    return MaskScore(both / said if said else None, both / there if there else None)


def recovered(
    guess: Guesses,
    verified: Bool[Tensor, "guesses patches"],
    truth: Images,
    patch_size: tuple[int, int],
) -> Bool[Tensor, "batch patches"]:
    """Return which true patches a patch that the attack claims to have proved does reproduce.

    A patch counts where some verified guess, at any position and in any image, comes within
    `RECOVERED` dB and at least as far above the patch's own mean colour as a leak must be. A batch
    whose images cannot be told apart, or a shuffle that hides where a patch was, gives them away
    all the same, while the PSNR of whole images stays low.

    Args:
        guess: Pixels in [0, 1].
        verified: The patches of `guess` that the attack vouches for.
        truth: Pixels in [0, 1].
        patch_size: (height, width) of a patch in pixels.
    """
    guess, truth = _images(guess, "guess"), _images(truth, "truth", strict=True)
    _same_shape(guess, truth, "a guess")
    patches, claimed = _patches(truth, patch_size), _patches(guess, patch_size)
    if verified.shape != claimed.shape[:2]:
        raise expected(f"verified of shape {tuple(claimed.shape[:2])}", tuple(verified.shape))
    claimed = claimed[verified.detach().cpu().bool()].flatten(1)
    if not len(claimed):
        return torch.zeros(patches.shape[:2], dtype=torch.bool)
    flat = (patches - patches.mean(-1, keepdim=True)).square().mean((-2, -1))
    wanted = patches.flatten(2)
    distance = torch.cdist(wanted, claimed, compute_mode="donot_use_mm_for_euclid_dist")
    error = distance.min(-1).values.square() / wanted.shape[-1]
    level = _decibels(error)
    return (level >= RECOVERED) & (level >= _decibels(flat) + _ABOVE_FLAT)


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of a guess against each truth; every tensor has one entry per truth.

    Args:
        psnr: dB under `assignment`, the best by this number.
        patch_psnr: dB, patches matched, under `patch_assignment`, the best by this number.
        ssim, mse, fft2d: Under `assignment`.
        assignment, patch_assignment: Index of the guess that stands for each truth.
        identified: Whether the truth is nearer than every decoy; None without decoys.
        decoys: How many decoys there were.
        lpips: None without a model.
        recovered: Which true patches a verified patch reproduces; None where nothing is verified.
    """

    psnr: PerImage
    patch_psnr: PerImage
    ssim: PerImage
    mse: PerImage
    fft2d: PerImage
    assignment: Int[Tensor, " batch"]
    patch_assignment: Int[Tensor, " batch"]
    identified: Bool[Tensor, " batch"] | None = None
    decoys: int = 0
    lpips: PerImage | None = None
    recovered: Bool[Tensor, "batch patches"] | None = None


def score(
    guess: Guesses,
    truth: Images,
    patch_size: tuple[int, int],
    *,
    decoys: Decoys | None = None,
    lpips_model: Perceptual | None = None,
    verified: Bool[Tensor, "guesses patches"] | None = None,
) -> Scores:
    """Score guesses against all truths under the best assignment of guesses to truths.

    Args:
        guess: Pixels in [0, 1], in any order; one may stand for the whole batch.
        truth: Pixels in [0, 1].
        patch_size: (height, width) of a patch in pixels.
        decoys: Other images for the identification, none of them a truth.
        lpips_model: See `lpips`.
        verified: See `recovered`.

    Raises:
        InputError: Values that are not finite, shapes that differ, patches that do not divide.
    """
    guess, truth = _images(guess, "guess"), _images(truth, "truth", strict=True)
    _same_shape(guess, truth, "a guess")
    rows = [g.expand_as(truth) for g in guess[:, None]]
    raw = torch.stack([psnr(row, truth) for row in rows])
    matched = torch.stack([patch_psnr(row, truth, patch_size) for row in rows])
    assignment, patch_assignment = best_assignment(raw), best_assignment(matched)
    each = torch.arange(len(truth))
    chosen = guess[assignment]
    return Scores(
        psnr=raw[assignment, each],
        patch_psnr=matched[patch_assignment, each],
        ssim=ssim(chosen, truth),
        mse=mse(chosen, truth),
        fft2d=fft2d(chosen, truth),
        assignment=assignment,
        patch_assignment=patch_assignment,
        identified=None if decoys is None else identification(guess, truth, decoys),
        decoys=0 if decoys is None else len(decoys),
        lpips=None if lpips_model is None else lpips(chosen, truth, lpips_model),
        recovered=None if verified is None else recovered(guess, verified, truth, patch_size),
    )


def _images(images: Tensor, name: str, *, strict: bool = False) -> Tensor:
    if images.ndim != 4 or not all(images.shape) or not images.is_floating_point():
        raise expected(
            f"{name} as floating pixels of shape (batch, channels, height, width)",
            f"{images.dtype} of shape {tuple(images.shape)}",
        )
    images = images.detach().to("cpu", torch.float64)
    if not images.isfinite().all():
        raise expected(f"finite pixels in {name}", "NaN or infinity")
    low, high = float(images.min()), float(images.max())
    if strict and not (low >= -1e-3 and high <= 1 + 1e-3):
        raise expected(
            f"{name} with pixels in [0, 1]",
            f"[{low:.3g}, {high:.3g}]",
            "Undo the model's normalisation first.",
        )
    return images.clamp(0, 1)


def _same_shape(images: Tensor, truth: Tensor, name: str) -> None:
    if images.shape[1:] != truth.shape[1:]:
        raise expected(f"{name} of shape {tuple(truth.shape[1:])}", tuple(images.shape[1:]))


def _pair(guess: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    guess, truth = _images(guess, "guess"), _images(truth, "truth", strict=True)
    if guess.shape != truth.shape:
        raise expected(f"a guess of shape {tuple(truth.shape)}", tuple(guess.shape))
    return guess, truth


def _decibels(error: Tensor) -> Tensor:
    return -10 * error.clamp(min=10 ** (-PSNR_CAP / 10)).log10()


def _patches(
    images: Tensor, size: tuple[int, int]
) -> Float[Tensor, "batch patches channels pixels"]:
    """Cut images into patches, row by row as a patch embedding does."""
    (height, width), (rows, columns) = size, images.shape[-2:]
    if height < 1 or width < 1 or rows % height or columns % width:
        raise expected(
            f"a patch size that divides {rows} x {columns} pixels", f"{height} x {width}"
        )
    cut = functional.unfold(images, size, stride=size)
    return cut.view(len(images), images.shape[1], height * width, -1).permute(0, 3, 1, 2)


def _matched_mse(guess: Tensor, truth: Tensor) -> Tensor:
    """Mean squared error of (patches, channels, pixels) under the best patch assignment."""
    rows, columns = linear_sum_assignment(_distances(guess, truth).numpy())
    moved = guess[torch.as_tensor(rows)] - truth[torch.as_tensor(columns)]
    return moved.square().mean()


def _nearest_mse(guess: Tensor, truth: Tensor) -> Tensor:
    """Return what `_matched_mse` is at least: each patch takes its nearest, taken or not."""
    nearest = _distances(guess, truth)
    return torch.maximum(nearest.amin(0).mean(), nearest.amin(1).mean()) / truth[0].numel()


def _distances(guess: Tensor, truth: Tensor) -> Float[Tensor, "guessed true"]:
    """Return the squared distances between patches (patches, channels, pixels)."""
    # Differences first: |g|^2 + |t|^2 - 2 g.t would not see equal patches as exactly equal.
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cdist(guess.flatten(1), truth.flatten(1), compute_mode=mode).square()


def _spectrum(images: Tensor) -> Float[Tensor, "batch frequencies"]:
    spectrum = torch.fft.fft2(images).abs().flatten(2)[:, :, 1:]
    # Rounding leaves about 1e-13 per frequency in a constant channel: that is no spectrum.
    noise = 1e-12 * images.shape[-1] * images.shape[-2]
    return torch.where(spectrum > noise, spectrum, 0.0).flatten(1)


def _standardized(images: Tensor) -> Float[Tensor, "batch values"]:
    """Unit vectors with the mean of each channel removed; zero for a constant image."""
    centred = (images - images.mean((-2, -1), keepdim=True)).flatten(1)
    norm = centred.norm(dim=1, keepdim=True)
    constant = norm <= 1e-9 * centred.shape[1] ** 0.5
    return torch.where(constant, 0.0, centred / norm.clamp(min=1e-300))
