"""The same modules with fewer passes over memory: LoRA projections, gated MLPs and RMS norms, forward and backward.

PEFT's LoRA layer casts its input to the adapter's dtype and back, scales and adds the small product in passes of their own,
and autograd keeps each step's result. `torch.autograd` cannot know that the base is frozen, that an activation is cheap to
compute again, or that a product can be added while another is computed. Here each module is one function with a backward
pass of its own. `fuse` replaces the forward pass of every module whose class it knows and whose numbers it reproduces on a
made-up input; any other module stays as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Largest deviation of a fused module's output from its own, relative to the largest.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def fuse(model: nn.Module) -> None:
    """Replaces the forward passes of a PEFT model's LoRA projections, gated MLPs and RMS norms where that is safe.

    Modules are compared as they are now: with dropout acting on a projection, its MLP stays as it is.
    """
    undo(model)
    for module in model.modules():
        if _is_gated_mlp(module) and _same(module, mlp := _MlpForward(module, module.forward)):
            module.forward = mlp
        elif _is_lora_linear(module):
            module.forward = _LoraForward(module, module.forward)
        elif type(module).__name__.endswith("RMSNorm") and (norm := _fused_norm(module)):
            module.forward = norm


def _same(module: Any, fused: Any) -> bool:
    """Whether a fused forward pass gives a module's numbers for a made-up input."""
    weight = next(module.parameters())
    width = (module.gate_proj if hasattr(module, "gate_proj") else module).weight.shape[-1]
    x = torch.randn(1, 8, width, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    with torch.no_grad(), torch.random.fork_rng([]):
        own, ours = module(x), fused(x)
    if ours.dtype != own.dtype or ours.shape != own.shape:
        return False
    limit = TOLERANCE.get(_dtype(x), 0.0) * float(own.abs().max())
    return float((ours.float() - own.float()).abs().max()) <= limit


def undo(model: nn.Module) -> None:
    """Gives every module its own forward pass back."""
    for module in model.modules():
        fused = module.__dict__.get("forward")
        if isinstance(fused, _LoraForward | _MlpForward | _NormForward):
            del module.forward
            if fused.previous is not None:
                module.forward = fused.previous


# --- LoRA projections ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Projection:
    """y = x W' + bias + x a' b', all in one dtype; `a` [r, in] and `b` [out, r], which holds the scale, or None.

    Args:
        weight: [out, in].
        bias: [out], or None.
        scale: lora_alpha / r.
    """

    weight: Tensor
    bias: Tensor | None
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(y [T, out], x a' [T, r]) of x [T, in]."""
        y = torch.mm(x, self.weight.t()) if self.bias is None else torch.addmm(self.bias, x, self.weight.t())
        if self.a is None or self.b is None:
            return y, None
        low = torch.mm(x, self.a.t())
        return y.addmm_(low, self.b.t()), low

    def backward(self, dy: Tensor, x: Tensor, low: Tensor | None, dx: Tensor | None = None) -> tuple[Tensor, ...]:
        """(dx [T, in], added to one that is given; dA, dB in float32; both missing without an adapter)."""
        dx = torch.mm(dy, self.weight) if dx is None else dx.addmm_(dy, self.weight)
        if self.a is None or self.b is None or low is None:
            return (dx,)
        d_low = torch.mm(dy, self.b)
        return dx.addmm_(d_low, self.a), torch.mm(d_low.t(), x).float(), torch.mm(dy.t(), low).float().mul_(self.scale)


def _is_lora_linear(module: nn.Module) -> bool:
    """Whether a module is PEFT's plain LoRA on a plain linear layer: no DoRA or other variant, no bias of its own."""
    from peft.tuners.lora.layer import Linear

    if type(module) is not Linear or not _is_frozen_linear(module.base_layer) or module.fan_in_fan_out:
        return False
    return list(module.lora_A) == ["default"] and not module.lora_variant and not module.lora_bias["default"]


def _is_frozen_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear and not any(parameter.requires_grad for parameter in module.parameters())


def _is_active(module: Any) -> bool:
    """Whether a LoRA layer adds its product at all now."""
    return not module.disable_adapters and not module.merged and list(module.active_adapters) == ["default"]


def _is_plain(module: Any) -> bool:
    """Whether a projection of an MLP is a linear layer alone or with its own adapter, without dropout, now."""
    if not hasattr(module, "base_layer"):
        return True
    is_off = module.disable_adapters and not module.merged
    return is_off or (_is_active(module) and not _drops(module))


def _drops(module: Any) -> bool:
    dropout = module.lora_dropout["default"]
    return bool(module.training and not isinstance(dropout, nn.Identity) and dropout.p > 0)


def _fits(module: Any, x: Tensor) -> bool:
    """Whether the base's weights are in the dtype of the computation: else each call would keep a copy of them."""
    base = module.base_layer if hasattr(module, "base_layer") else module
    return bool(base.weight.dtype == _dtype(x))


def _dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def _adapter(module: Any) -> tuple[Tensor | None, Tensor | None]:
    """The parameters A and B of a projection, (None, None) where it has no adapter or it is off."""
    if not hasattr(module, "base_layer") or not _is_active(module):
        return None, None
    return module.lora_A["default"].weight, module.lora_B["default"].weight


def _projection(module: Any, dtype: torch.dtype, a: Tensor | None, b: Tensor | None) -> _Projection:
    base = module.base_layer if hasattr(module, "base_layer") else module
    weight, bias = base.weight.to(dtype), None if base.bias is None else base.bias.to(dtype)
    if a is None or b is None:
        return _Projection(weight, bias)
    scale = module.scaling["default"]
    return _Projection(weight, bias, a.to(dtype), (b * scale).to(dtype), scale)


class _LoraForward:
    """The forward pass of one LoRA projection."""

    def __init__(self, module: Any, original: Any) -> None:
        self.module, self.original, self.previous = module, original, module.__dict__.get("forward")

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not _is_active(self.module) or _drops(self.module) or not _fits(self.module, x):
            result: Tensor = self.original(x, *args, **kwargs)
            return result
        return _Lora.apply(x, self.module, *_adapter(self.module))


class _Lora(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any, a: Tensor, b: Tensor) -> Tensor:
        dtype = _dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            projection = _projection(module, dtype, a, b)
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            y, low = projection.forward(rows)
        ctx.projection = projection
        ctx.save_for_backward(rows, low)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, low = ctx.saved_tensors
        dx, da, db = ctx.projection.backward(dy.reshape(-1, dy.shape[-1]), rows, low)
        return dx.view(ctx.shape).to(ctx.dtype), None, da, db


# --- gated MLPs ------------------------------------------------------------------------------------------------------


def _is_gated_mlp(module: Any) -> bool:
    """Whether a module computes down(act(gate(x)) * up(x)) from three projections that are known here."""
    names = ("gate_proj", "up_proj", "down_proj")
    if not all(hasattr(module, name) for name in names) or not callable(getattr(module, "act_fn", None)):
        return False
    parts = [getattr(module, name) for name in names]
    return set(dict(module.named_children())) <= {*names, "act_fn"} and all(
        _is_frozen_linear(part) or _is_lora_linear(part) for part in parts
    )


class _MlpForward:
    """The forward pass of one gated MLP."""

    def __init__(self, module: Any, original: Any) -> None:
        self.module, self.original, self.previous = module, original, module.__dict__.get("forward")
        self.parts = (module.gate_proj, module.up_proj, module.down_proj)

    def __call__(self, x: Tensor) -> Tensor:
        if not all(_is_plain(part) and _fits(part, x) for part in self.parts):
            result: Tensor = self.original(x)
            return result
        adapters = [tensor for part in self.parts for tensor in _adapter(part)]
        return _Mlp.apply(x, self.module.act_fn, self.parts, *adapters)


class _Mlp(torch.autograd.Function):  # type: ignore[misc]
    """Keeps x, gate(x) and up(x); the activation and its product are computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Any, parts: Sequence[Any], *adapters: Tensor | None) -> Tensor:
        dtype = _dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            gate_proj, up_proj, down_proj = projections = [
                _projection(part, dtype, *adapters[2 * index : 2 * index + 2]) for index, part in enumerate(parts)
            ]
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            gate, gate_low = gate_proj.forward(rows)
            up, up_low = up_proj.forward(rows)
            y, down_low = down_proj.forward(activation(gate) * up)
        ctx.save_for_backward(rows, gate, gate_low, up, up_low, down_low)
        ctx.projections, ctx.activation, ctx.shape, ctx.dtype = projections, activation, x.shape, x.dtype
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, gate, gate_low, up, up_low, down_low = ctx.saved_tensors
        gate_proj, up_proj, down_proj = ctx.projections
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            active = ctx.activation(leaf)
        d_product, *d_down = down_proj.backward(dy.reshape(-1, dy.shape[-1]), active.detach() * up, down_low)
        d_up = active.detach() * d_product
        (d_gate,) = torch.autograd.grad(active, leaf, d_product.mul_(up))
        dx, *d_gate_adapter = gate_proj.backward(d_gate, rows, gate_low)
        dx, *d_up_adapter = up_proj.backward(d_up, rows, up_low, dx)
        missing = (None, None)
        return (
            dx.view(ctx.shape).to(ctx.dtype),
            None,
            None,
            *(d_gate_adapter or missing),
            *(d_up_adapter or missing),
            *(d_down or missing),
        )


# --- RMS norms -------------------------------------------------------------------------------------------------------


def _fused_norm(module: Any) -> "_NormForward | None":
    """A norm's fused forward pass, with what it adds to its weight (Gemma: 1, Llama: 0); None for another kind of norm."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or weight.requires_grad or _epsilon(module) is None:
        return None
    return next((norm for offset in (0.0, 1.0) if _same(module, norm := _NormForward(module, offset))), None)


def _epsilon(module: Any) -> float | None:
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return epsilon if isinstance(epsilon, float) else None


class _NormForward:
    """The forward pass of one RMS norm."""

    def __init__(self, module: Any, offset: float) -> None:
        self.module, self.offset, self.epsilon = module, offset, _epsilon(module)
        self.previous = module.__dict__.get("forward")

    def __call__(self, x: Tensor) -> Tensor:
        return _Norm.apply(x, self.module.weight, self.offset, self.epsilon)


class _Norm(torch.autograd.Function):  # type: ignore[misc]
    """y = x / rms(x) * (weight + offset), rms(x) = sqrt(mean(x^2) + epsilon), in float32 (Zhang & Sennrich 2019, 1910.07467).

    With n = x / rms(x) and g = dy * (weight + offset): dx = (g - n * mean(g * n)) / rms(x).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offset: float, epsilon: float) -> Tensor:
        wide = x.float()
        inverse = (
            torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        )
        factor = weight.float() + offset if offset else weight
        normed = wide * inverse
        y = normed.mul_(factor).to(x.dtype) if offset else normed.to(x.dtype) * factor
        ctx.save_for_backward(x, inverse, factor)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse, factor = ctx.saved_tensors
        wide = x.float()
        pulled = (dy * factor).float()
        share = torch.linalg.vecdot(pulled, wide).unsqueeze(-1).mul_(inverse * inverse * inverse).div_(-x.shape[-1])
        return pulled.mul_(inverse).addcmul_(wide, share).to(x.dtype), None, None, None
