"""Row spaces, checked against what really flows through the layers."""

import pytest
import torch

from vitguard.attacks.equations.rows import (
    Embedding,
    block_rows,
    complement,
    layer_rows,
    least_squares,
    patch_basis,
    require_rank,
    right_vectors,
    row_basis,
    whitened,
)
from vitguard.attacks.span.smooth import smoothest
from vitguard.core import AffineSpace, Normalization
from vitguard.errors import Blocked, NotApplicable
from vitguard.vit import Anatomy


def inputs_of(model, name, images):
    """Return what module `name` reads, shape (tokens, width)."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _m, a: seen.append(a[0]))
    model.eval()(images)
    handle.remove()
    return seen[0].detach().flatten(0, 1)


@pytest.mark.parametrize(
    "changes",
    [{}, {"reg_tokens": 3}, {"no_embed_class": True}, {"class_token": False, "global_pool": "avg"}],
)
def test_the_public_embedding_is_what_enters_the_first_block(small_vit, observe, photo, changes):
    model = small_vit(**changes).double()
    view = observe(model, photo.double())
    anatomy = Anatomy.of(view.model)
    embedding = Embedding.of(view, anatomy)
    patches = anatomy.patchify(Normalization().apply(photo.double()))[0]
    tokens = torch.cat([embedding.prefix, patches @ embedding.weight.T + embedding.offset])
    entered = inputs_of(model, "blocks.0", Normalization().apply(photo.double()))
    assert torch.allclose(tokens, entered, atol=1e-12)


def test_the_rows_of_a_gradient_span_the_inputs_of_the_layer(small_vit, observe, photo):
    model = small_vit().double()
    view = observe(model, photo.double())
    anatomy = Anatomy.of(view.model)
    block = anatomy.blocks[0]
    images = Normalization().apply(photo.double())
    for rows, module in (
        (block_rows(view, block), "blocks.0.attn.qkv"),
        (layer_rows(view, block.fc1), "blocks.0.mlp.fc1"),
        (layer_rows(view, block.proj), "blocks.0.attn.proj"),
    ):
        inputs = inputs_of(model, module, images)
        augmented = torch.cat([inputs, torch.ones(len(inputs), 1).double()], 1)
        outside = complement(rows.matrix, anatomy.tokens)
        assert rows.augmented and outside.shape == (97, 97 - 17)
        assert (augmented @ outside).norm() < 1e-7 * augmented.norm()
        inside = row_basis(rows.matrix, anatomy.tokens)
        assert torch.allclose(inside.T @ inside, torch.eye(17).double(), atol=1e-9)
    basis = patch_basis(view, anatomy)
    patches = anatomy.patchify(images)[0]
    assert torch.allclose(patches @ basis @ basis.T, patches, atol=1e-7)


def test_a_sealed_bias_only_drops_the_column_and_a_sealed_weight_blocks(small_vit, observe, photo):
    model = small_vit()
    block = Anatomy.of(model).blocks[0]
    rows = block_rows(observe(model, photo, withhold=(r"qkv\.bias",)), block)
    assert not rows.augmented and rows.matrix.shape[1] == 96
    with pytest.raises(Blocked, match=r"qkv\.weight"):
        block_rows(observe(model, photo, withhold=(r"qkv\.weight",)), block)
    view = observe(model, photo, withhold=("patch",))
    assert patch_basis(view, Anatomy.of(model)) is None


def test_whitening_keeps_the_row_space_and_leaves_zero_rows():
    matrix = torch.randn(6, 4).double() * torch.tensor([1e6, 1, 1e-6, 1, 1, 0.0])[:, None]
    white = whitened(matrix)
    assert torch.allclose(white[:5].norm(dim=1), torch.ones(5).double())
    assert not white[5].any()


def test_least_squares_is_minimum_norm_with_its_rank_and_refuses_nan(generator):
    system = torch.randn(5, 3, generator=generator).double() @ torch.diag(
        torch.tensor([1, 1, 0.0]).double()
    )
    target = torch.randn(5, 2, generator=generator).double()
    solution, rank, _ = least_squares(system, target)
    assert rank == 2
    assert torch.allclose(solution, torch.linalg.pinv(system) @ target, atol=1e-10)
    with pytest.raises(NotApplicable, match="not finite"):
        least_squares(system * torch.nan, target)


@pytest.mark.parametrize("shape, rank", [((7, 3), 3), ((7, 3), 2), ((3, 3), 3), ((3, 7), 3)])
def test_least_squares_says_what_it_leaves(shape, rank, generator):
    left = torch.randn(shape[0], rank, generator=generator).double()
    system = left @ torch.randn(rank, shape[1], generator=generator).double()
    target = torch.randn(shape[0], 4, generator=generator).double()
    fit = least_squares(system, target)
    assert fit.rank == rank
    slow = float((system @ fit.solution - target).norm())
    assert fit.residual == pytest.approx(slow, rel=1e-9, abs=1e-12)


def test_singular_vectors_of_nan_are_refused():
    with pytest.raises(NotApplicable, match="not finite"):
        right_vectors(torch.full((3, 3), torch.nan).double(), 2)


def test_a_rank_far_below_the_tokens_is_refused():
    require_rank(torch.tensor([3.0, 2.0, 1.0, 1e-9, 1e-9]).double(), 3, "w")
    require_rank(torch.tensor([3.0, 2.0, 1.0, 0.9, 0.8]).double(), 3, "w")
    with pytest.raises(NotApplicable, match="rank 1"):
        require_rank(torch.tensor([1.0, 1e-8, 9e-9, 8e-9, 7e-9]).double(), 3, "w")


def hand_anatomy(channels: int, size: int = 8, patch: int = 4) -> Anatomy:
    return Anatomy(
        "hand", "proj", "proj", None, 0, (), None, (), (), (size, size), (patch, patch), channels,
        7, 2,
    )  # fmt: skip


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_smoothest_image_has_the_sparsest_curvature_and_stays_in_its_space(
    shared, channels, generator
):
    anatomy = hand_anatomy(channels)
    pixels = 16 * channels
    origin = torch.randn(4, pixels, generator=generator).double()
    shape = (pixels, 3) if shared else (4, pixels, 3)
    basis = torch.linalg.qr(torch.randn(shape, generator=generator).double()).Q
    normalization = Normalization((0.4,) * channels, (0.2, 0.25, 0.3)[:channels])
    found = smoothest(
        AffineSpace(origin, basis), anatomy, normalization=normalization, iterations=200
    )
    each = basis.expand(4, pixels, 3)
    moved = torch.einsum("npk,np->nk", each, found - origin)
    assert torch.allclose(found, origin + torch.einsum("npk,nk->np", each, moved), atol=1e-8)

    # written anew, with convolutions: the size of every second difference of every colour, each
    # by its mean in the result, borders as heavy as insides, and what lies outside [0, 1]
    kernels = [[[1.0, -2, 1]], [[1.0], [-2], [1]], [[1.0, -1], [-1, 1]]]
    brightness, red_blue, green = [1.0, 1, 1], [1.0, 0, -1], [1.0, -2, 1]
    colours = torch.tensor([brightness, red_blue, green] if channels == 3 else [[1.0]]).double()
    colours = torch.nn.functional.normalize(colours)

    def parts_of(v):
        patches = origin + torch.einsum("npk,nk->np", each, v)
        pixels = normalization.invert(anatomy.unpatchify(patches))
        image = (colours @ pixels.flatten(1)).view(channels, 1, 8, 8)
        conv = torch.nn.functional.conv2d
        return [conv(image, torch.tensor(k).double()[None, None]) for k in kernels], pixels

    # which of 6 or 7 differences along one side reach over the border in the middle of 8 pixels
    three, two, one = torch.zeros(6), torch.zeros(7), torch.zeros(8)
    three[2:4], two[3] = 1, 1
    over = [one[:, None] + three, three[:, None] + one, (two[:, None] + two).clamp(max=1)]
    borders = [torch.where(o > 0, (1 - o).sum() / o.sum(), 1.0).double() for o in over]
    assert [b.max() for b in borders] == [2, 2, pytest.approx(36 / 13)]
    means = [p.abs().mean((1, 2, 3), keepdim=True) for p in parts_of(moved)[0]]
    usual = torch.cat(means).log().mean().exp()

    def energy(v):
        parts, pixels = parts_of(v)
        sizes = [
            (b * usual / m * (p.square() + 256**-2).sqrt()).sum()
            for b, p, m in zip(borders, parts, means, strict=True)
        ]
        outside = (pixels - pixels.clamp(0, 1)).square().sum()
        return torch.stack(sizes).sum() + 50 * outside

    slow = moved.clone().requires_grad_()
    search = torch.optim.LBFGS([slow], max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        search.zero_grad()
        value = energy(slow)
        value.backward()
        return value

    search.step(closure)
    start, best = energy(torch.zeros(4, 3).double()), energy(slow)
    assert energy(moved) - best < 1e-2 * (start - best)


def test_an_image_of_few_edges_comes_back_from_mixtures_with_others(generator):
    """Squares would trade the edges for the mixture and leave 2 to 4 % of it."""
    anatomy = hand_anatomy(3, size=32, patch=8)
    down, across = torch.meshgrid(*[torch.linspace(0, 1, 32).double()] * 2, indexing="ij")
    image = torch.stack([across, 0.5 * down, (across > 0.3) * 0.7 + 0.1 * down])
    truth = anatomy.patchify(image)
    basis = torch.linalg.qr(torch.randn(192, 8, generator=generator).double()).Q
    wrong = torch.randn(16, 8, generator=generator).double() @ basis.T
    plain = Normalization((0.0,) * 3, (1.0,) * 3)
    found = smoothest(AffineSpace(truth + wrong, basis), anatomy, normalization=plain)
    assert (found - truth).norm() < 2e-3 * wrong.norm()
