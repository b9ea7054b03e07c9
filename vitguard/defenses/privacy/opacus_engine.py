"""Opacus's per-sample gradients, made to fit Vision Transformers: the reference engine.

Opacus's hooks treat the leaf layers it has samplers for; bare parameters (tokens, positions,
LayerScale, bias tables) go to the tape. So no layer falls into functorch, and random layers and
layers with buffers work. This file imports opacus; it is loaded for `engine="opacus"` only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.grad_sample_module import GradSampleHooks
from torch import Tensor, nn

from vitguard.defenses.privacy.engine import Engine, refuse_float16
from vitguard.defenses.privacy.tape import Products, Samples, Tape
from vitguard.errors import Incompatible, Unprotected

__all__ = ["OpacusEngine"]

_SAMPLED = (nn.Linear, nn.Conv2d, nn.LayerNorm)


def _kind(module: nn.Module) -> type[nn.Module] | None:
    """Return the class whose sampler fits a layer; a subclass may compute in another way.

    `nn.MultiheadAttention` never calls the layer that holds its output weights.
    """
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None
    for kind in _SAMPLED:
        own = kind is nn.LayerNorm or type(module).forward is kind.forward
        bare = isinstance(getattr(module, "weight", None), nn.Parameter)  # not one that is computed
        if isinstance(module, kind) and own and bare:
            return kind
    return None


class _Hooks(GradSampleHooks):
    GRAD_SAMPLERS: ClassVar[dict[Any, Any]] = dict(GradSampleModule.GRAD_SAMPLERS)

    def iterate_submodules(self, module: nn.Module) -> Iterable[nn.Module]:
        for part in module.modules():
            if _kind(part) and any(p.requires_grad for p in part.parameters(recurse=False)):
                yield part

    def _get_module_type(self, module: nn.Module) -> Any:
        return _kind(module)

    @classmethod
    def validate(cls, module: nn.Module, *, strict: bool = False) -> list[NotImplementedError]:
        return []  # vitguard's own checks ran; buffers of tables and rotations are no statistics

    def rearrange_grad_samples(self, **settings: Any) -> Any:
        if not settings["module"].activations:
            raise Unprotected(
                "Expected one backward pass for each batch with engine='opacus', got a second. Add "
                "up the losses first, or use engine='bookkeeping'."
            )
        activations, backprops = super().rearrange_grad_samples(**settings)
        # Opacus reads memory order where index order is meant: wrong under channels_last.
        return [a.contiguous() for a in activations], backprops.contiguous()


class _OpacusTape(Tape):
    """A tape for bare parameters, joined with what Opacus's hooks found."""

    def __init__(self, model: nn.Module, batch: int, constants: frozenset[int]) -> None:
        sampled = {
            f"{path}.{name}".lstrip("."): p
            for path, module in model.named_modules()
            if _kind(module)
            for name, p in module.named_parameters(recurse=False)
            if p.requires_grad
        }
        bare = {k: p for k, p in model.named_parameters() if p.requires_grad and k not in sampled}
        super().__init__(bare, batch, constants)
        self._sampled = sampled
        self._hooks = _Hooks(model, loss_reduction="sum")

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from super().parameters()
        yield from self._sampled.items()

    def collect(self) -> dict[str, Samples | Products]:
        found = super().collect()
        for name, p in self._sampled.items():
            if isinstance(values := getattr(p, "grad_sample", None), Tensor):
                found[name] = Samples(values.reshape(self.batch, -1, *p.shape).sum(1))
            elif p.grad is not None:
                raise Incompatible(
                    f"Expected Opacus to see each use of {name}, got one outside its layer's own "
                    "call. Use engine='bookkeeping'."
                )
            p.grad = None
        self.close()
        return found

    def close(self) -> None:
        """Leave nothing of Opacus on the model."""
        self._hooks.remove_hooks()
        for p in (*self._sampled.values(), *(p for _, p in self._parameters.values())):
            for name in ("grad_sample", "_forward_counter", "_current_grad_sample"):
                if hasattr(p, name):
                    delattr(p, name)


class OpacusEngine(Engine):
    """Per-sample gradients by Opacus, for comparison: slower, and all of them in memory."""

    accumulates: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__(check=False)
        self._tape: _OpacusTape | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tape": None}

    def close(self) -> None:
        if self._tape is not None:
            self._tape.close()
        self._tape = None

    def tape(self, model: nn.Module, batch: int) -> Tape:
        refuse_float16(model)
        frozen = [p for p in model.parameters() if not p.requires_grad]
        self.close()
        constants = frozenset(map(id, (*frozen, *model.buffers())))
        self._tape = _OpacusTape(model, batch, constants)
        return self._tape
