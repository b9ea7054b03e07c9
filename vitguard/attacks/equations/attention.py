"""The first block's attention as an equation between tokens.

For a token t of an image, o_t = sum_j softmax_j(q_t k_j / sqrt(d)) v_j per head, j over the tokens
of the same image. With o_t and the tokens known it says which tokens belong together; with all but
a few tokens known it says what the rest are (docs/methods.md 2.4b, step 5).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vitguard.attacks.budget import charge
from vitguard.attacks.equations.linear import solve_positive
from vitguard.attacks.equations.mlp import Norm
from vitguard.attacks.equations.probe import probe
from vitguard.core import View
from vitguard.errors import NotApplicable
from vitguard.vit import Anatomy

__all__ = ["AttentionDraws", "Attention"]


@dataclass(frozen=True)
class AttentionDraws:
    """What the query of each token draws from every other, were they in one image.

    Args:
        weights: exp(q k) of each query, up to a factor, shape (heads, tokens, prefix + tokens).
        values: Shape (heads, prefix + tokens, size).
        patches: Of one image; tokens not found yet count as the mean of those found.
    """

    weights: Float[Tensor, "heads tokens others"]
    values: Float[Tensor, "heads others size"]
    patches: int

    def of(self, group: Tensor) -> Float[Tensor, "tokens width"]:
        """Return what each token would attend to together with the tokens of a mask."""
        count = len(group)
        members = group.expand(count, count) | torch.eye(count, dtype=torch.bool)
        share = members * (self.patches / members.sum(1, keepdim=True))
        prefix = torch.ones(count, self.values.shape[1] - count)
        weights = self.weights * torch.cat([prefix, share], 1)
        drawn = (weights @ self.values) / weights.sum(-1, keepdim=True)
        return drawn.transpose(0, 1).flatten(1)


@dataclass(frozen=True)
class Attention:
    """Query, key and value maps of the first block, in float64.

    Args:
        norm: The norm in front.
        weight, bias: Shapes (3 width, width) and (3 width,).
        heads: Number of heads.
    """

    norm: Norm
    weight: Tensor
    bias: Tensor
    heads: int

    @staticmethod
    def of(view: View, anatomy: Anatomy) -> Attention:
        """Read the maps; the number of heads is the one that reproduces the module's output.

        Raises:
            NotApplicable: No number of heads does: the attention is not the plain softmax form,
                or its weights have no known names.
        """
        block = anatomy.blocks[0]
        if not block.qkv:
            raise NotApplicable("the weights of query, key and value have no known names")
        weight = torch.cat([view.weight(name) for name in block.qkv])
        biases = [view.weight(name) for name in block.qkv_bias]
        bias = torch.cat(biases) if biases else weight.new_zeros(len(weight))
        if len(bias) != len(weight) or len(weight) != 3 * anatomy.width:
            raise NotApplicable("query, key and value are not of the token's width")
        norm = Norm.of(view, block.norm1)
        seen = probe(view, leaving=[block.norm1, block.attention])
        inputs, output = (t[0].double() for t in seen)
        project = view.weight(f"{block.proj}.weight")
        shift = view.bias(block.proj)
        for heads in (h for h in range(1, 65) if anatomy.width % h == 0):
            attention = Attention(norm, weight, bias, heads)
            charge(products=8.0 * len(inputs) * anatomy.width**2, calls=16)
            query, key, value = attention._split(inputs @ weight.T + bias)
            made = attention.attend(query, key, value) @ project.T + shift
            if torch.allclose(made, output, atol=1e-4 * float(output.abs().max())):
                return attention
        raise NotApplicable("the attention is not plain multi-head softmax attention")

    def _split(self, mapped: Tensor) -> list[Tensor]:
        """Cut (tokens, 3 width) into query, key, value of shape (heads, tokens, width / heads)."""
        return [
            part.reshape(len(part), self.heads, -1).transpose(0, 1)
            for part in mapped.chunk(3, dim=-1)
        ]

    def _merge(self, heads: Tensor) -> Tensor:
        return heads.transpose(0, 1).flatten(1)

    def _scores(self, query: Tensor, key: Tensor) -> Tensor:
        return query @ key.mT / query.shape[-1] ** 0.5

    def _weights(self, query: Tensor, key: Tensor) -> Tensor:
        return self._scores(query, key).softmax(-1)

    def maps(self, tokens: Float[Tensor, "tokens width"]) -> list[Tensor]:
        """Return query, key, value of embedded tokens z, (heads, tokens, width / heads) each."""
        return self._split(self.norm(tokens) @ self.weight.T + self.bias)

    def attend(
        self,
        query: Float[Tensor, "heads tokens size"],
        key: Float[Tensor, "heads others size"],
        value: Float[Tensor, "heads others size"],
    ) -> Float[Tensor, "tokens width"]:
        """Return o of the queries' tokens, in front of the projection."""
        return self._merge(self._weights(query, key) @ value)

    def draws(
        self, tokens: Float[Tensor, "tokens width"], prefix: Tensor, patches: int
    ) -> AttentionDraws:
        """Return what embedded tokens would draw from each other, on the CPU."""
        query, key, value = self.maps(torch.cat([prefix, tokens]))
        count, width = len(tokens) + len(prefix), tokens.shape[1]
        charge(products=count * width * (6.0 * width + 2.0 * count), calls=20)
        charge(elements=self.heads * count * count)
        scores = self._scores(query[:, len(prefix) :], key)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        return AttentionDraws(weights.cpu().float(), value.cpu().float(), patches)

    def membership(
        self,
        tokens: Float[Tensor, "tokens width"],
        attended: Float[Tensor, "tokens width"],
        prefix: Float[Tensor, "prefix width"],
        position: Tensor,
        patches: int,
        seed: int,
    ) -> tuple[Tensor, float]:
        """Return which tokens share the image of token `seed`, and how far from whole that was.

        sum_j y_j exp(q k_j) (v_j - o) = 0 and one token per position are linear in y. The second
        value is the larger of the distance to whole numbers and the relative attention residual:
        about 1e-4 when the image is complete, 0.1 and more when it is not.
        """
        query, key, value = self.maps(torch.cat([prefix, tokens]))
        count, width = len(tokens) + len(prefix), tokens.shape[1]
        charge(products=count * width * (6.0 * width + 2.0 * count), calls=20)
        charge(elements=self.heads * count * count)
        scores = self._scores(query[:, len(prefix) + seed][:, None], key)[:, 0]
        weights = (scores - scores.amax(1, keepdim=True)).exp()
        output = attended[seed].reshape(self.heads, -1)
        terms = (weights[:, :, None] * (value - output[:, None])).transpose(0, 1).flatten(1)
        own, fixed = terms[len(prefix) :], terms[: len(prefix)].sum(0)
        scale = own.norm(dim=1).max()
        one = torch.nn.functional.one_hot(position, patches).to(tokens)
        matrix = torch.cat([own / scale, one], 1).T
        count, width = len(tokens), tokens.shape[1]
        charge(products=6.0 * count * width**2, svd=matrix.numel() * min(matrix.shape), calls=40)
        right = torch.cat([-fixed / scale, torch.ones_like(one[0])])
        y = torch.linalg.lstsq(matrix, right[:, None], driver="gelsd").solution[:, 0]
        member = y > 0.5
        whole = float((y - member.to(y)).abs().max())
        alone = int(one[member].sum(0).sub(1).abs().max())
        misfit = float((own[member].sum(0) + fixed).norm() / own[member].norm())
        return member, max(whole, misfit, float(alone))

    def complete(
        self,
        known: Float[Tensor, "known width"],
        asked: Float[Tensor, "asked width"],
        attended: Float[Tensor, "asked width"],
        embed: Float[Tensor, "width pixels"],
        offset: Float[Tensor, "missing width"],
        start: Float[Tensor, "missing pixels"],
        spread: float,
        *,
        iterations: int = 20,
    ) -> tuple[Float[Tensor, "missing pixels"], float]:
        """Solve for the missing tokens z = W x + offset of one image by Gauss-Newton.

        `asked` are tokens of the image whose attention output `attended` is known. A Gaussian prior
        around `start`'s mean with deviation `spread` is halved at every step. The starts must
        differ: tokens that share an offset would otherwise move as one.
        """
        _, key, value = self.maps(known)
        query = self.maps(asked)[0]
        target = attended.reshape(len(attended), self.heads, -1).transpose(0, 1)
        centre, x = start.mean(0).expand_as(start).flatten(), start.flatten()
        shape, damping = start.shape, 1e-3

        def miss(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            tokens = x.reshape(shape) @ embed.T + offset
            _, new_key, new_value = self.maps(tokens)
            weights = self._weights(query, torch.cat([key, new_key], 1))
            output = weights @ torch.cat([value, new_value], 1)
            return (output - target).flatten(), (tokens, new_value, weights, output)

        error, state = miss(x)
        prior = float(error.square().sum()) / x.numel() / spread**2
        rows, width = attended.numel(), embed.shape[0]
        steps = 2.0 * rows * x.numel() ** 2 + 2.0 * x.numel() ** 3
        maps = 8.0 * width * width * (shape[0] * shape[1] + 3 * shape[0])
        for _ in range(iterations):
            charge(products=steps + maps, elements=0.6 * rows * x.numel(), calls=120)
            jacobian = self._jacobian(embed, query, *state)
            normal = jacobian.T @ jacobian
            right = jacobian.T @ error + prior * (x - centre)
            cost = error.square().sum() + prior * (x - centre).square().sum()
            for _ in range(5):
                lift = torch.diag(damping * normal.diagonal() + prior)
                trial = x - solve_positive((normal + lift)[None], right[None])[0]
                new_error, new_state = miss(trial)
                new_cost = new_error.square().sum() + prior * (trial - centre).square().sum()
                if bool(new_cost < cost):
                    x, error, state, damping = trial, new_error, new_state, max(damping * 0.3, 1e-9)
                    break
                damping *= 5
            prior = max(0.5 * prior, 1e-14)
        return x.reshape(shape), float(error.norm() / attended.norm())

    def _jacobian(
        self,
        embed: Tensor,
        query: Tensor,
        tokens: Tensor,
        value: Tensor,
        weights: Tensor,
        output: Tensor,
    ) -> Tensor:
        """d o / d x of the missing tokens: A (dv + (v - o) q dk / sqrt(d))."""
        missing, width = len(tokens), embed.shape[0]
        normed = self.norm.pushed(tokens[:, None], embed.T).mT
        both = (self.weight[width:] @ normed).unflatten(1, (2, self.heads, -1))
        key, value_move = both[:, 0], both[:, 1]  # missing, heads, width / heads, pixels
        attention = weights[:, :, -missing:]
        pull = torch.einsum("htd,mhdp->htmp", query, key) / query.shape[-1] ** 0.5
        gap = attention[..., None] * (value[:, None] - output[:, :, None])  # heads, t, m, d
        first = attention[:, :, None, :, None] * value_move.permute(1, 2, 0, 3)[:, None]
        second = gap.transpose(2, 3)[..., None] * pull[:, :, None]
        return (first + second).flatten(3).flatten(0, 2)
