"""Properties of the scores: what must look like a leak does, and what knows nothing does not."""

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitguard import data, metrics
from vitguard.errors import InputError


@pytest.fixture(scope="module")
def photos():
    return data.sample_images((64, 64)).pixels


@pytest.fixture(scope="module")
def decoys(photos):
    return data.decoys(100, (64, 64), data.SAMPLE_NAMES)


def shuffled(images, patch, seed=0):
    """Move the patches of each image to random places."""
    generator = torch.Generator().manual_seed(seed)
    batch, channels, height, width = images.shape
    rows, columns = height // patch, width // patch
    cut = images.view(batch, channels, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
    order = torch.randperm(rows * columns, generator=generator)
    moved = cut.flatten(1, 2)[:, order].unflatten(1, (rows, columns))
    return moved.permute(0, 3, 1, 4, 2, 5).reshape(images.shape)


def uninformed(kind, images, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if kind == "grey":
        return torch.full_like(images, 0.5)
    if kind == "black":
        return torch.zeros_like(images)
    if kind == "colour":
        return images.mean((-2, -1), keepdim=True).expand_as(images)
    if kind == "uniform":
        return torch.rand(images.shape, generator=generator)
    return (0.5 + 0.2 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def everything(result):
    return [v for v in vars(result).values() if isinstance(v, torch.Tensor)]


@pytest.mark.slow
def test_truth_scores_perfectly(photos, decoys):
    result = metrics.score(photos, photos, (16, 16), decoys=decoys)
    assert result.psnr.tolist() == [200.0] * 7
    assert result.patch_psnr.tolist() == [200.0] * 7
    assert result.mse.tolist() == [0.0] * 7
    assert torch.allclose(result.ssim, torch.ones(7, dtype=torch.float64))
    assert (result.fft2d < 1e-12).all()
    assert result.identified.all()
    assert result.assignment.tolist() == list(range(7))
    assert result.decoys == 100


@pytest.mark.parametrize("patch", [4, 16])
def test_shuffled_truth_scores_exactly_200_matched_and_little_raw(photos, patch):
    result = metrics.score(shuffled(photos, patch), photos, (patch, patch))
    assert result.patch_psnr.tolist() == [200.0] * 7
    assert float(result.psnr.mean()) < 13
    assert float(result.psnr.max()) < 20


def test_shuffled_patches_that_almost_coincide_still_score_200():
    base = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ramp = torch.linspace(0, 1e-6, 64).reshape(8, 8).repeat_interleave(4, 0).repeat_interleave(4, 1)
    near = (base[:, :, :4, :4].repeat(1, 1, 8, 8) * 0.9 + ramp).double()
    assert metrics.patch_psnr(shuffled(near, 4), near, (4, 4)).tolist() == [200.0]


@pytest.mark.parametrize("kind", ["grey", "black", "colour", "uniform", "gaussian"])
def test_guesses_without_information_stay_below_6_dB_above_the_baseline(photos, kind):
    floor = metrics.baseline(photos, (8, 8))
    result = metrics.score(uninformed(kind, photos), photos, (8, 8))
    assert (result.patch_psnr < floor.patch_psnr + 6).all()
    assert (result.psnr < floor.psnr + 6).all()


@pytest.mark.parametrize("kind", ["grey", "black", "colour"])
def test_constant_guesses_are_never_identified(photos, decoys, kind):
    guess = uninformed(kind, photos)
    assert not metrics.score(guess, photos, (8, 8), decoys=decoys).identified.any()
    assert not metrics.score(guess[:1], photos, (8, 8), decoys=decoys).identified.any()


@pytest.mark.parametrize(
    ("guesses", "seeds"), [(7, 4), *(pytest.param(n, 12, marks=pytest.mark.slow) for n in (1, 7))]
)
def test_noise_is_identified_no_more_often_than_chance(guesses, seeds):
    truth, hits, trials = data.sample_images((32, 32)).pixels, 0, 0
    for seed in range(seeds):
        others = data.decoys(30, (32, 32), data.SAMPLE_NAMES, seed)
        guess = uninformed("uniform", truth, seed)[:guesses]
        hits += int(metrics.identification(guess, truth, others).sum())
        trials += len(truth)
    assert metrics.identification_p(hits, trials, 30) > 0.001


def test_a_faint_trace_of_the_truth_is_identified(photos, decoys):
    guess = 0.5 + 0.1 * (photos - 0.5) + 0.2 * (uninformed("uniform", photos) - 0.5)
    result = metrics.score(guess, photos, (8, 8), decoys=decoys)
    floor = metrics.baseline(photos, (8, 8))
    assert result.identified.all()
    assert (result.psnr < floor.psnr + 6).all()


@pytest.mark.parametrize("guesses", [1, 2, 3, 5])
def test_guesses_may_be_fewer_or_more_than_truths_and_in_any_order(photos, guesses):
    truth = photos[:3]
    pool = torch.cat([photos[2:3], photos[1:2], photos[0:1], photos[5:7]])
    result = metrics.score(pool[:guesses], truth, (16, 16))
    assert all(len(v) == 3 for v in everything(result))
    found = [i for i in range(3) if float(result.psnr[i]) == 200.0]
    assert found == list(range(3))[-min(guesses, 3) :]
    for i in found:
        assert int(result.assignment[i]) == 2 - i == int(result.patch_assignment[i])


def test_one_guess_stands_for_all_truths(photos):
    result = metrics.score(photos[4:5], photos, (16, 16))
    assert result.assignment.tolist() == [0] * 7
    each = torch.cat([metrics.psnr(photos[4:5], t[None]) for t in photos])
    assert torch.equal(result.psnr, each)


def test_left_over_truths_take_their_best_guess():
    quality = torch.tensor([[9.0, 8.0, 1.0], [5.0, 1.0, 2.0]])
    assert metrics.best_assignment(quality).tolist() == [1, 0, 1]


@pytest.mark.slow
def test_the_baseline_is_the_luckiest_guess_without_information(photos):
    flat = metrics.baseline(photos, (8, 8))
    greys = [metrics.psnr(torch.full_like(photos, v), photos) for v in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert (flat.psnr >= torch.stack(greys).amax(0)).all()
    assert (flat.psnr < metrics.psnr(uninformed("colour", photos), photos)).all()  # its own colour
    exact = metrics.baseline(photos, (8, 8), shuffled(photos[:1], 8))
    assert float(exact.patch_psnr[0]) == 200.0 and float(exact.psnr[0]) < 20
    assert (exact.psnr >= flat.psnr).all() and (exact.patch_psnr >= flat.patch_psnr).all()
    assert float(metrics.baseline(photos, (8, 8), photos[2:4]).psnr[3]) == 200.0


@pytest.mark.parametrize("colour", [(0, 0, 0), (1, 1, 1), (1, 0, 0), (0.5, 0.5, 0.5)])
def test_an_image_of_one_colour_that_anyone_would_try_leaks_nothing(colour):
    plain = torch.tensor(colour).float()[:, None, None].expand(1, 3, 16, 16)
    assert metrics.baseline(plain, (4, 4)).psnr.tolist() == [200.0]


@pytest.mark.parametrize("away", [0.0, 0.03, 0.1, 0.2, 0.5])
def test_every_guess_counts_wherever_it_is_better(photos, away):
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(2, *photos[2].shape, generator=generator) - 0.5
    guesses = (photos[2:4] + away * noise).clamp(0, 1)
    made = metrics.baseline(photos, (8, 8), guesses).patch_psnr
    each = [metrics.patch_psnr(g.expand_as(photos), photos, (8, 8)) for g in guesses]
    slow = torch.stack([metrics.baseline(photos, (8, 8)).patch_psnr, *each]).amax(0)
    torch.testing.assert_close(made, slow)


def test_the_thumbnail_is_every_patch_at_its_own_colour_and_no_order_beats_it(photos):
    patches = photos.unflatten(2, (8, 8)).unflatten(4, (8, 8)).mean((3, 5))
    flat = patches.repeat_interleave(8, 2).repeat_interleave(8, 3)
    thumbnail = metrics.baseline(photos, (8, 8)).thumbnail
    assert torch.allclose(metrics.psnr(flat, photos), thumbnail, atol=1e-9)
    assert torch.allclose(metrics.patch_psnr(flat, photos, (8, 8)), thumbnail, atol=1e-9)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    patch=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    contrast=st.sampled_from([0.0, 1e-12, 1e-3, 1.0, 1e6]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_scores_are_finite_bounded_and_matching_never_lowers(
    seed, batch, grid, patch, contrast, dtype
):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 3, grid[0] * patch[0], grid[1] * patch[1])
    truth = (0.5 + min(contrast, 1) * (torch.rand(shape, generator=generator) - 0.5)).to(dtype)
    guess = (0.5 + contrast * torch.randn(shape, generator=generator).double()).float()
    decoys = torch.rand(5, *shape[1:], generator=generator)
    result = metrics.score(guess, truth, patch, decoys=decoys)
    assert all(v.isfinite().all() for v in everything(result))
    assert ((result.psnr >= 0) & (result.psnr <= 200)).all()
    assert ((result.ssim >= -1 - 1e-9) & (result.ssim <= 1 + 1e-9)).all()
    assert ((result.fft2d >= 0) & (result.fft2d <= 1)).all()
    raw = metrics.psnr(guess, truth)
    assert (metrics.patch_psnr(guess, truth, patch) >= raw).all()
    assert float(result.patch_psnr.sum()) >= float(result.psnr.sum()) - 1e-9
    floor = metrics.baseline(truth, patch, decoys)
    assert floor.psnr.isfinite().all() and floor.patch_psnr.isfinite().all()


def test_fft2d_of_constant_images(photos):
    grey, white = torch.full_like(photos, 0.3), torch.ones_like(photos)
    assert metrics.fft2d(grey, photos).tolist() == [1.0] * 7
    assert metrics.fft2d(grey, white).tolist() == [0.0] * 7


@pytest.mark.parametrize("shape", [(37, 50), (64, 64), (224, 224)])
def test_rounding_in_a_constant_image_is_no_pattern(shape):
    colours = torch.tensor([0.1, 1 / 3, 0.7], dtype=torch.float64)
    flat = colours[:, None, None].expand(1, 3, *shape)
    other = flat.flip(1) * 0.9
    decoys = torch.rand(1, 3, *shape, generator=torch.Generator().manual_seed(0))
    assert float(metrics.fft2d(flat, other)) == 0.0
    assert float(metrics.fft2d(flat, decoys)) == 1.0
    truth = torch.rand(20, 3, *shape, generator=torch.Generator().manual_seed(1))
    assert not metrics.identification(flat, truth, decoys).any()


def test_fft2d_ignores_where_a_pattern_lies(photos):
    assert (metrics.fft2d(photos.roll((5, 9), (2, 3)), photos) < 1e-9).all()


def test_a_guess_beyond_the_range_is_seen_as_a_viewer_shows_it(photos):
    wide = torch.where(photos > 0.5, photos * 100, photos)
    assert torch.equal(metrics.psnr(wide, photos), metrics.psnr(wide.clamp(0, 1), photos))


def test_mask_score_counts_under_the_assignment():
    true = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1]]).bool()
    inferred = torch.tensor([[0, 0, 1, 1], [1, 0, 0, 0]]).bool()
    assert metrics.mask_score(inferred, true, [1, 0]) == metrics.MaskScore(2 / 3, 2 / 3)
    assert metrics.mask_score(inferred, true, torch.tensor([0, 1])) == metrics.MaskScore(0.0, 0.0)


def test_mask_score_is_none_where_undefined():
    nothing, some = torch.zeros(1, 4).bool(), torch.tensor([[1, 0, 0, 0]]).bool()
    assert metrics.mask_score(nothing, nothing, [0]) == metrics.MaskScore(None, None)
    assert metrics.mask_score(nothing, some, [0]) == metrics.MaskScore(None, 0.0)
    assert metrics.mask_score(some, nothing, [0]) == metrics.MaskScore(0.0, None)


def test_recovered_counts_verified_patches_anywhere_in_the_batch_and_nothing_else(photos):
    patch, truth = (8, 8), photos[:2]
    patches = truth[0].shape[-2] // 8 * (truth[0].shape[-1] // 8)
    guess = torch.full_like(truth, 0.5)
    guess[1, :, :8, 8:16] = truth[0, :, 8:16, :8] + 1e-4  # another image, another place
    guess[0, :, -8:, -8:] = truth[1, :, -8:, -8:]
    columns = truth.shape[-1] // 8
    claimed = torch.zeros(2, patches, dtype=torch.bool)
    claimed[1, 1] = claimed[0, 0] = True  # one that is right, a grey one that is not
    right = metrics.recovered(guess, claimed, truth, patch)
    assert right.shape == (2, patches)
    assert right.nonzero().tolist() == [[0, columns]]  # the unclaimed one does not count
    flat = truth.clone()
    flat[0, :, 8:16, :8] = 0.3  # where a flat guess is as good, nothing was recovered
    guess[1, :, :8, 8:16] = 0.3
    assert not metrics.recovered(guess, claimed, flat, patch).any()
    assert not metrics.recovered(guess, torch.zeros_like(claimed), truth, patch).any()
    with pytest.raises(InputError, match="verified"):
        metrics.recovered(guess, claimed[:, 1:], truth, patch)


def test_lpips_runs_only_with_the_callers_model(photos):
    def model(a, b):
        assert a.dtype == torch.float32 and float(a.min()) >= -1 and float(b.max()) <= 1
        return (a - b).abs().mean((1, 2, 3), keepdim=True)

    assert metrics.score(photos, photos, (8, 8)).lpips is None
    result = metrics.score(photos.flip(0), photos, (8, 8), lpips_model=model)
    assert result.lpips.tolist() == [0.0] * 7
    with pytest.raises(InputError, match="LPIPS"):
        metrics.lpips(photos, photos, lambda a, b: torch.tensor(float("nan")))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(photos, value):
    broken = photos.clone()
    broken[1, 0, 3, 3] = value
    with pytest.raises(InputError, match="finite pixels in guess"):
        metrics.score(broken, photos, (8, 8))
    with pytest.raises(InputError, match="finite pixels in truth"):
        metrics.score(photos, broken, (8, 8))
    with pytest.raises(InputError, match="finite pixels in decoys"):
        metrics.score(photos, photos, (8, 8), decoys=broken)


def test_unusable_input_is_refused_with_a_reason(photos):
    with pytest.raises(InputError, match="divides 64 x 64 pixels, got 7 x 8"):
        metrics.score(photos, photos, (7, 8))
    with pytest.raises(InputError, match="normalisation"):
        metrics.score(photos, photos * 4 - 2, (8, 8))
    with pytest.raises(InputError, match=r"shape \(3, 64, 64\), got \(3, 32, 32\)"):
        metrics.score(photos[:, :, :32, :32], photos, (8, 8))
    with pytest.raises(InputError, match="batch, channels"):
        metrics.psnr(photos[0], photos[0])
    with pytest.raises(InputError, match="floating"):
        metrics.psnr((photos * 255).byte(), photos)
    with pytest.raises(InputError, match="shape"):
        metrics.score(photos[:0], photos, (8, 8))
    with pytest.raises(InputError, match="without information"):
        metrics.baseline(photos, (8, 8), photos[:, :, :32, :32])
    with pytest.raises(InputError, match="3 of 2"):
        metrics.identification_p(3, 2, 10)
    with pytest.raises(InputError, match="masks"):
        metrics.mask_score(torch.ones(1, 3), torch.ones(1, 4), [0])


def test_inputs_are_left_as_they_were(photos):
    guess = (photos * 3 - 1).requires_grad_()
    before = guess.detach().clone()
    result = metrics.score(guess, photos, (8, 8))
    assert torch.equal(guess, before)
    assert not any(v.requires_grad for v in everything(result))


def test_an_image_of_196_patches_is_scored_in_well_under_a_second_of_the_processor():
    truth = data.sample_images((224, 224), count=1).pixels
    guess = shuffled(truth, 16)
    metrics.score(guess, truth, (16, 16))
    start = time.thread_time()
    metrics.score(guess, truth, (16, 16))
    assert time.thread_time() - start < 1.0  # 0.03 s, and no more beside other processes
