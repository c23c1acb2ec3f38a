"""Fused = the modules' own: values and gradients of LoRA projections, gated MLPs and RMS norms, and what is left alone.

The other side is what PEFT and transformers compute by themselves, on the same weights. Each comparison is repeated with
a fused pass that is wrong in one way (`WRONG`), or with a setting that must make a difference, and must then fail.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from politune.models import fused
from politune.training.packable import without_dropout
from tiny import tiny_models

EXACT = 1e-6
# SiLU; biases of q, k and v; norms of each head; GELU and 1 + weight; those and norms of each head.
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ROWS, LENGTH = 4, 2, 9


def build(name: str = "llama", dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    """A family's model with an adapter whose A and B are random, its norms' weights and biases too; in training mode."""
    base = tiny_models.build_causal(name)
    generator = torch.Generator().manual_seed(1)
    for parameter in base.parameters():
        if parameter.ndim == 1:
            parameter.data += torch.empty(parameter.shape).uniform_(-0.5, 0.5, generator=generator)
    settings = {"r": RANK, "lora_alpha": 12, "target_modules": list(PROJECTIONS), "task_type": "CAUSAL_LM", **lora}
    with torch.random.fork_rng([]):
        torch.manual_seed(2)
        model: Any = get_peft_model(base.to(dtype), LoraConfig(**settings)).train()
        randomise(model)
    return model


def randomise(model: Any) -> None:
    """A and B away from PEFT's start, where B is zero and hides what is wrong with A."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, dtype=torch.float32) * 0.2


def fuse(model: Any) -> Any:
    """As a run does it (`packable.why_not`)."""
    with torch.no_grad(), without_dropout(model):
        fused.fuse(model)
    return model


def list_fused(model: nn.Module) -> dict[str, str]:
    """The last names of the modules with a fused forward pass in the first layer, each with its kind."""
    kinds = {fused._LoraForward: "lora", fused._MlpForward: "mlp", fused._NormForward: "norm"}
    return {
        name.rpartition(".")[2]: kinds[type(module.__dict__["forward"])]
        for name, module in model.named_modules()
        if type(module.__dict__.get("forward")) in kinds and "layers.1" not in name
    }


def find(model: nn.Module, name: str) -> Any:
    return next(module for path, module in model.named_modules() if path.endswith(f"layers.0.{name}"))


def layer_parts(model: nn.Module) -> dict[str, Any]:
    """Every module of the first layer that may be fused, by its name there, and the norm after the last layer."""
    parts = {}
    for path, module in model.named_modules():
        name = path.partition("layers.0.")[2] or ("norm" if path.endswith("model.norm") else "")
        if name.endswith(("_proj", "mlp")) or (name.endswith("norm") and "lora" not in name):
            parts[name] = module
    return parts


def width_of(module: Any) -> int:
    projection = getattr(module, "gate_proj", module)
    return int(projection.weight.shape[-1])


def compute(
    module: Any, rounded: torch.dtype = torch.float32, seed: int = 5, x_dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Output of one module for random rows, and the gradients that a random pull has: of x and of every trained weight.

    Args:
        rounded: rows and pull are rounded to this before anything else.
        x_dtype: what the rows are handed over in.

    The backward pass is outside autocast, as the trainer's is.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, LENGTH, width_of(module), generator=generator).to(rounded).to(x_dtype).requires_grad_()
    y = module(x)
    pull = torch.randn(y.shape, generator=generator).to(rounded).to(y.dtype)
    trained = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
    with torch.autocast("cpu", enabled=False):
        gradients = torch.autograd.grad(y, [x, *trained.values()], pull, allow_unused=True)
    zeros = [torch.zeros_like(weight) for weight in (x, *trained.values())]
    gradients = [zero if gradient is None else gradient for zero, gradient in zip(zeros, gradients, strict=True)]
    return {"y": y.detach(), "x": gradients[0], **dict(zip(trained, gradients[1:], strict=True))}


def relative(one: Tensor, truth: Tensor) -> float:
    return float((one.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30))


def differences(one: dict[str, Tensor], other: dict[str, Tensor], limit: float = EXACT) -> set[str]:
    """What of two results differs: `y`, `x`, `A`, `B` (of whichever projection), or another weight's name."""
    assert one.keys() == other.keys()
    names = {name for name in one if not relative(one[name], other[name]) <= limit}
    return {name.split("lora_")[1][0] if "lora_" in name else name for name in names}


# --- fused passes that are wrong in one way ---------------------------------------------------------------------------


def _change_projection(**change: Any) -> Callable[[pytest.MonkeyPatch], None]:
    def break_it(patch: pytest.MonkeyPatch) -> None:
        right = fused._projection

        def projection(*args: Any) -> Any:
            made = right(*args)
            return dataclasses.replace(made, **{key: value(made) for key, value in change.items()})

        patch.setattr(fused, "_projection", projection)

    return break_it


def _change_gradient(index: int, factor: float) -> Callable[[pytest.MonkeyPatch], None]:
    """One of a projection's (dx, dA, dB) times a factor."""

    def break_it(patch: pytest.MonkeyPatch) -> None:
        right = fused._Projection.backward

        def backward(self: Any, *args: Any) -> tuple[Tensor, ...]:
            made = list(right(self, *args))
            if index < len(made):
                made[index] = made[index] * factor
            return tuple(made)

        patch.setattr(fused._Projection, "backward", backward)

    return break_it


def _forget_the_adapter_in_dx(patch: pytest.MonkeyPatch) -> None:
    right = fused._Projection.backward

    def backward(self: Any, dy: Tensor, x: Tensor, low: Tensor | None, dx: Tensor | None = None) -> tuple[Tensor, ...]:
        base = dx.clone() if dx is not None else None
        _, *others = right(self, dy, x, low, dx)
        return (torch.mm(dy, self.weight) if base is None else base.addmm_(dy, self.weight), *others)

    patch.setattr(fused._Projection, "backward", backward)


def _saved(change: Callable[[Any], None], of: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """The backward pass of a function finds something else than its forward pass left."""

    def break_it(patch: pytest.MonkeyPatch) -> None:
        right = of.forward

        def forward(ctx: Any, *args: Any) -> Any:
            result = right(ctx, *args)
            change(ctx)
            return result

        patch.setattr(of, "forward", staticmethod(forward))

    return break_it


def _set(name: str, value: Any) -> Callable[[Any], None]:
    return lambda ctx: setattr(ctx, name, value)


def _epsilon(patch: pytest.MonkeyPatch) -> None:
    right = fused._Norm.forward
    patch.setattr(fused._Norm, "forward", staticmethod(lambda ctx, x, w, o, e: right(ctx, x, w, o, e + 1e-4)))


def _no_mean(patch: pytest.MonkeyPatch) -> None:
    """The gradient of a norm as if rms(x) did not depend on x."""

    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _, inverse, factor = ctx.saved_tensors
        return dy * factor * inverse, None, None, None

    patch.setattr(fused._Norm, "backward", staticmethod(backward))


Break = Callable[[pytest.MonkeyPatch], None]
# Each with the module that shows it and what must then differ; 1 + 1e-5 is ten times the limit.
WRONG: dict[str, tuple[str, Break, set[str]]] = {
    "no scale": ("self_attn.q_proj", _change_projection(b=lambda p: p.b / p.scale), {"y", "x", "A"}),
    "no adapter": ("self_attn.q_proj", _change_projection(b=lambda p: p.b * 0), {"y", "x", "A"}),
    "no bias": ("self_attn.q_proj", _change_projection(bias=lambda p: None), {"y"}),
    "dx a little off": ("self_attn.q_proj", _change_gradient(0, 1 + 1e-5), {"x"}),
    "dA a little off": ("self_attn.q_proj", _change_gradient(1, 1 + 1e-5), {"A"}),
    "dB without its scale": ("self_attn.q_proj", _change_gradient(2, 1 / 3), {"B"}),
    "dx without the adapter": ("self_attn.q_proj", _forget_the_adapter_in_dx, {"x"}),
    "an MLP's dx without the adapters": ("mlp", _forget_the_adapter_in_dx, {"x", "A", "B"}),
    "an MLP's dB without its scale": ("mlp", _change_gradient(2, 1 / 3), {"B"}),
    "an MLP's dA a little off": ("mlp", _change_gradient(1, 1 + 1e-5), {"A"}),
    "another activation backward": ("mlp", _saved(_set("activation", torch.relu), fused._Mlp), {"x", "A", "B"}),
    "another epsilon": ("input_layernorm", _epsilon, {"y", "x"}),
    "a norm's dx without its mean": ("input_layernorm", _no_mean, {"x"}),
}  # fmt: skip


# --- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_fused_module_is_the_modules_own(name: str) -> None:
    """All projections, the MLP and all norms of a layer: values, and gradients of x and of every A and B."""
    model = build(name)
    own = {part: compute(module) for part, module in layer_parts(model).items()}
    fuse(model)
    kinds = list_fused(model)
    head_norms = {"q_norm": "norm", "k_norm": "norm"} if name in ("qwen3", "gemma3") else {}
    assert kinds.items() >= {**dict.fromkeys(PROJECTIONS, "lora"), "mlp": "mlp", "norm": "norm", **head_norms}.items()
    assert {"input_layernorm", "post_attention_layernorm"} <= kinds.keys()
    assert len(own) == len(kinds)
    for part, module in layer_parts(model).items():
        assert not differences(compute(module), own[part]), part
        assert differences(compute(module, seed=6), own[part]) >= {"y", "x"}, "the comparison sees other rows"


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_pass_is_seen(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    part, break_it, seen = WRONG[how]
    model = build("qwen2")  # biases
    own = compute(find(model, part))
    module = find(fuse(model), part)
    assert not differences(compute(module), own)
    break_it(monkeypatch)
    assert differences(compute(module), own) == seen


@pytest.mark.parametrize(("name", "offset"), [("llama", 0.0), ("gemma2", 1.0), ("gemma3", 1.0)])
def test_a_norm_knows_what_it_adds_to_its_weight(name: str, offset: float) -> None:
    model = build(name)
    norm = find(model, "input_layernorm")
    own = compute(norm)
    fuse(model)
    assert norm.forward.offset == offset
    norm.forward.offset = 1.0 - offset
    assert differences(compute(norm), own) == {"y", "x"}


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_whole_model_has_the_gradients_of_its_own_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build(name), torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))

    def gradients() -> Tensor:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.requires_grad])

    own = gradients()
    fuse(model)
    assert relative(gradients(), own) < 1e-5
    _no_mean(monkeypatch)
    assert relative(gradients(), own) > 1e-3


# --- bfloat16 ---------------------------------------------------------------------------------------------------------


def compute_in_bf16(module: Any, x_dtype: torch.dtype) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        return compute(module, torch.bfloat16, x_dtype=x_dtype)


@contextlib.contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """A module's own pass on the same weights, wider."""
    before = {name: parameter.data for name, parameter in module.named_parameters()}
    module.float()
    try:
        yield
    finally:
        for name, parameter in module.named_parameters():
            parameter.data = before[name]


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32], ids=["bfloat16 rows", "float32 rows"])
@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_bfloat16_is_as_near_to_float32_as_the_modules_own(
    name: str, x_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bfloat16 base, an adapter in float32, autocast: each value and gradient no further off than 1.3 times PEFT's.

    The same types come out. Control: without the scale of the adapter everything that depends on it is three times as far.
    """
    model = build(name, torch.bfloat16)
    truths, own = {}, {}
    for part, module in layer_parts(model).items():
        own[part] = compute_in_bf16(module, x_dtype)
        with in_float32(module):
            truths[part] = compute(module, torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        fused.fuse(model)
    assert {"mlp", "q_proj", "down_proj", "input_layernorm"} <= list_fused(model).keys()

    def far(part: str, module: Any, times: float) -> set[str]:
        ours = compute_in_bf16(module, x_dtype)
        assert {key: value.dtype for key, value in ours.items()} == {key: v.dtype for key, v in own[part].items()}
        bound = {key: times * relative(own[part][key], truth) + EXACT for key, truth in truths[part].items()}
        return {key for key, value in ours.items() if relative(value, truths[part][key]) > bound[key]}

    for part, module in layer_parts(model).items():
        assert not far(part, module, 1.3), part
    WRONG["no scale"][1](monkeypatch)
    for part in ("self_attn.q_proj", "mlp"):
        assert {"y", "x"} <= far(part, find(model, part), 3)


def test_a_float32_base_under_autocast_keeps_its_own_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of its weights in bfloat16 would be kept for every call; outside autocast it is fused."""
    model = fuse(build())
    calls = count_calls(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        ours = {part: compute(find(model, part)) for part in ("mlp", "self_attn.q_proj")}
        assert calls == []
        fused.undo(model)
        own = {part: compute(find(model, part)) for part in ours}
    assert not any(differences(ours[part], own[part], 0.0) for part in ours)
    fuse(model)
    calls.clear()
    compute(find(model, "mlp"))
    assert calls == ["mlp"]


def count_calls(patch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of fused passes, in the order in which they are computed from here on."""
    calls: list[str] = []
    for kind, function in {"lora": fused._Lora, "mlp": fused._Mlp, "norm": fused._Norm}.items():
        right = function.apply

        def apply(*args: Any, kind: str = kind, right: Any = right) -> Any:
            calls.append(kind)
            return right(*args)

        patch.setattr(function, "apply", apply)
    return calls


# --- adapters of other kinds, in other states -------------------------------------------------------------------------


@pytest.mark.parametrize("modules", [["gate_proj"], ["up_proj"], ["down_proj"], ["gate_proj", "down_proj"], ["q_proj"]])
def test_an_mlp_with_some_adapters_or_none(modules: list[str]) -> None:
    model = build("gemma2", target_modules=modules)
    mlp = find(model, "mlp")
    own = compute(mlp)
    fuse(model)
    assert list_fused(model)["mlp"] == "mlp"
    ours = compute(mlp)
    assert not differences(ours, own)
    assert len(ours) == 2 + 2 * len({*modules} - {"q_proj"})
    everywhere = compute(find(fuse(build("gemma2")), "mlp"))
    assert relative(everywhere["y"], own["y"]) > 1e-2


def test_a_disabled_adapter_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """`disable_adapter` is how DPO gets its reference; afterwards the adapter acts again."""
    model = build("qwen2")
    parts = ("mlp", "self_attn.q_proj")
    with model.disable_adapter():
        own = {part: compute(find(model, part)) for part in parts}
    fuse(model)
    with model.disable_adapter():
        assert not any(differences(compute(find(model, part)), own[part]) for part in parts)
    with_adapter = {part: compute(find(model, part)) for part in parts}
    assert all(relative(with_adapter[part]["y"], own[part]["y"]) > 1e-2 for part in parts)
    monkeypatch.setattr(fused, "_is_active", lambda module: True)
    with model.disable_adapter():
        assert all(relative(compute(find(model, part))["y"], own[part]["y"]) > 1e-2 for part in parts)


def test_a_merged_adapter_is_not_added_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen2")
    parts = ("mlp", "self_attn.q_proj")
    own = {part: compute(find(model, part))["y"] for part in parts}
    fuse(model).merge_adapter()
    assert all(relative(compute(find(model, part))["y"], own[part]) < 1e-5 for part in parts)
    with monkeypatch.context() as inside:
        inside.setattr(fused, "_is_active", lambda module: True)
        assert all(relative(compute(find(model, part))["y"], own[part]) > 1e-2 for part in parts)
    model.unmerge_adapter()
    assert all(relative(compute(find(model, part))["y"], own[part]) < 1e-5 for part in parts)


def test_disabling_a_merged_adapter_takes_it_out() -> None:
    """PEFT undoes the merge in the next forward pass of each layer."""
    model = build()
    with model.disable_adapter():
        own = compute(find(model, "mlp"))["y"]
    fuse(model).merge_adapter()
    with model.disable_adapter():
        assert relative(compute(find(model, "mlp"))["y"], own) < 1e-5


def add_other(model: Any) -> None:
    modules = list(PROJECTIONS)
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=2, target_modules=modules, task_type="CAUSAL_LM"))
    with torch.random.fork_rng([]):
        torch.manual_seed(9)
        randomise(model)


@pytest.mark.parametrize(
    ("when", "part"),
    [
        ("before", "self_attn.q_proj"),
        ("before", "mlp"),
        ("after", "self_attn.q_proj"),
        ("after", "mlp"),
    ],
)
def test_another_adapter_is_computed_by_peft(when: str, part: str) -> None:
    """Added before or after fusing: values and gradients of whichever is active, and they differ."""
    results = []
    for fuses in (False, True):
        model = build()
        if fuses and when == "after":
            fuse(model)
        add_other(model)
        if fuses and when == "before":
            assert not {"lora", "mlp"} & {*list_fused(fuse(model)).values()}
        found = {}
        for adapter in ("default", "other"):
            model.set_adapter(adapter)
            found[adapter] = compute(find(model, part))
        results.append(found)
    assert relative(results[0]["other"]["y"], results[0]["default"]["y"]) > 1e-2
    for adapter in ("default", "other"):
        assert not differences(results[1][adapter], results[0][adapter])


@pytest.mark.parametrize(
    ("lora", "left_alone"),
    [
        ({"use_dora": True}, True),
        ({"lora_bias": True, "target_modules": ["q_proj", "k_proj", "v_proj"]}, True),
        ({"use_rslora": True}, False),
        ({"modules_to_save": ["input_layernorm"]}, False),
        ({"rank_pattern": {"q_proj": 2, "up_proj": 7}, "alpha_pattern": {"q_proj": 1, "down_proj": 40}}, False),
        ({"init_lora_weights": "pissa"}, False),
        ({"bias": "none", "fan_in_fan_out": False}, False),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_other_kinds_of_lora(lora: dict[str, Any], left_alone: bool) -> None:
    """DoRA and an adapter with a bias of its own are PEFT's; another scale is another number."""
    model = build("qwen2", **lora)
    parts = ("self_attn.q_proj", "mlp", "input_layernorm")
    own = {part: compute(find(model, part)) for part in parts}
    fuse(model)
    assert ("lora" in list_fused(model).values()) is not left_alone
    for part in parts:
        assert not differences(compute(find(model, part)), own[part]), part
    plain = compute(find(fuse(build("qwen2")), "self_attn.q_proj"))["y"]
    if lora.keys() & {"use_dora", "use_rslora", "rank_pattern"}:
        assert relative(plain, own["self_attn.q_proj"]["y"]) > 1e-3


@pytest.mark.parametrize("where", ["self_attn.q_proj", "mlp"])
def test_a_base_bias_that_is_trained_keeps_its_gradient(where: str) -> None:
    """`bias="all"` of PEFT; politune's own runs have `bias="none"`."""
    model = build("qwen2", bias="all") if where != "mlp" else build()
    if where == "mlp":
        find(model, "mlp.gate_proj").base_layer.weight.requires_grad_()
    own = compute(find(model, where))
    assert not differences(compute(find(fuse(model), where)), own)


# --- dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["self_attn.q_proj", "mlp"])
def test_lora_dropout_is_pefts_in_training_and_fused_in_evaluation(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same masks for the same seed; no fused pass is taken, and without dropout one is."""
    model = build(lora_dropout=0.4)
    module = find(model, part)

    def draw(seed: int) -> dict[str, Tensor]:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return compute(module)

    own, evaluated = draw(1), compute(module.eval())
    fuse(model.train())
    calls = count_calls(monkeypatch)
    assert not differences(draw(1), own, 0.0)
    assert differences(draw(2), own) >= {"y", "x", "A", "B"}
    assert calls == []
    assert not differences(compute(model.eval() and module), evaluated)
    assert calls == ["mlp" if part == "mlp" else "lora"]


def test_fusing_draws_no_random_numbers_and_changes_no_mode() -> None:
    model = build(lora_dropout=0.4)
    random, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    fused.fuse(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert "mlp" not in list_fused(model), "dropout acted on the comparison"
    assert list_fused(fuse(build(lora_dropout=0.4)))["mlp"] == "mlp"


# --- left alone -------------------------------------------------------------------------------------------------------


def test_layer_norms_are_left_alone() -> None:
    model = build("bloom", target_modules="all-linear")
    assert {type(module).__name__ for module in model.modules()} >= {"LayerNorm"}
    assert "norm" not in list_fused(fuse(model)).values()
    assert "norm" in list_fused(fuse(build())).values()


def test_a_trained_norm_is_left_alone() -> None:
    model = build()
    norm = find(model, "input_layernorm")
    norm.weight.requires_grad_()
    own = compute(norm)
    fuse(model)
    assert "forward" not in norm.__dict__
    assert not differences(compute(norm), own, 0.0)
    assert float(own["weight"].norm()) > 0
    norm.weight.requires_grad_(False)
    assert "forward" in find(fuse(model), "input_layernorm").__dict__


def test_a_saved_copy_of_a_norm_is_left_alone() -> None:
    """`modules_to_save` puts a trained copy beside the frozen one."""
    wrapped = find(fuse(build(modules_to_save=["input_layernorm"])), "input_layernorm")
    assert "forward" not in wrapped.modules_to_save["default"].__dict__
    wrapped(torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    assert bool(wrapped.modules_to_save["default"].weight.grad.any())


class DoubledMLP(LlamaMLP):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        doubled: Tensor = 2 * super().forward(x)
        return doubled


class SwappedMLP(LlamaMLP):  # type: ignore[misc]
    """The activation on the other branch."""

    def forward(self, x: Tensor) -> Tensor:
        swapped: Tensor = self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))
        return swapped


class PaddedMLP(LlamaMLP):  # type: ignore[misc]
    """With a module of its own that the fused pass does not know, and that does nothing for now."""


class HalfRMSNorm(LlamaRMSNorm):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        half: Tensor = super().forward(x) * 0.5
        return half


class WideRMSNorm(LlamaRMSNorm):  # type: ignore[misc]
    """The mean over rows of two halves."""

    def forward(self, x: Tensor) -> Tensor:
        halves = x.unflatten(-1, (2, -1))
        scale = torch.rsqrt(halves.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (halves * scale).flatten(-2)


class MeanRMSNorm(LlamaRMSNorm):  # type: ignore[misc]
    """A layer norm by another name."""

    def forward(self, x: Tensor) -> Tensor:
        centred: Tensor = super().forward(x - x.mean(-1, keepdim=True))
        return centred


@pytest.mark.parametrize("kind", [DoubledMLP, SwappedMLP, PaddedMLP])
def test_an_mlp_of_another_formula_is_left_alone(kind: Any) -> None:
    model = build()
    mlp = find(model, "mlp")
    mlp.__class__ = kind
    if kind is PaddedMLP:
        mlp.inner = nn.Identity()
    own = compute(mlp)["y"]
    fuse(model)
    assert "forward" not in mlp.__dict__
    assert relative(compute(mlp)["y"], own) < EXACT
    mlp.__class__ = LlamaMLP
    mlp._modules.pop("inner", None)
    assert "forward" in find(fuse(model), "mlp").__dict__


@pytest.mark.parametrize("kind", [HalfRMSNorm, WideRMSNorm, MeanRMSNorm])
def test_a_norm_of_another_formula_is_left_alone(kind: Any) -> None:
    model = build()
    norm = find(model, "input_layernorm")
    norm.__class__ = kind
    fuse(model)
    assert "forward" not in norm.__dict__
    norm.__class__ = LlamaRMSNorm
    assert "forward" in find(fuse(model), "input_layernorm").__dict__


def test_four_bit_layers_are_left_alone(tiny_llama: Path) -> None:
    """Their LoRA layers are of another class of PEFT's; the norms between them are fused."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = LoraConfig(r=RANK, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM")
    kinds = []
    for quantization in (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32), None):
        base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32, quantization_config=quantization)
        model: Any = get_peft_model(base.requires_grad_(False), settings).train()
        randomise(model)
        own = compute_layer(model)
        fuse(model)
        kinds.append({*list_fused(model).values()})
        assert relative(compute_layer(model), own) < 1e-5
    assert kinds == [{"norm"}, {"norm", "lora", "mlp"}]


def compute_layer(model: Any) -> Tensor:
    ids = torch.arange(5, 25).view(2, 10)
    logits: Tensor = model(input_ids=ids).logits.detach()
    return logits


# --- gradient checkpointing, memory, and what is left behind ----------------------------------------------------------


def test_gradient_checkpointing_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Non-reentrant: every fused pass of a layer is computed twice, and no gradient changes by a bit."""
    model, ids = fuse(build()), torch.arange(3, 27).view(2, 12)

    def gradients() -> Tensor:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.requires_grad])

    calls = count_calls(monkeypatch)
    plain, before = gradients(), calls.count("mlp")
    calls.clear()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(gradients(), plain)
    assert (before, calls.count("mlp")) == (2, 4)
    _no_mean(monkeypatch)
    assert not torch.equal(gradients(), plain)


def kept(module: Any) -> list[tuple[int, ...]]:
    """Shapes of what a module's pass keeps for its backward pass, less its weights; a row's two leading sizes as one."""
    weights = {parameter.data_ptr() for parameter in module.parameters()}
    seen: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            seen[tensor.data_ptr(), tuple(tensor.shape[1:] if tensor.ndim == 3 else tensor.shape)] = tensor
        return tensor

    x = torch.randn(1, LENGTH, width_of(module), generator=torch.Generator().manual_seed(5))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x.requires_grad_())
    return sorted(tuple(tensor.shape[1:] if tensor.ndim == 3 else tensor.shape) for tensor in seen.values())


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("self_attn.q_proj", [(LENGTH, RANK), (LENGTH, 32)]),
        ("mlp", [*[(LENGTH, RANK)] * 3, (LENGTH, 32), *[(LENGTH, 48)] * 2]),
        ("input_layernorm", [(32,), (LENGTH, 1), (LENGTH, 32)]),
    ],
)
def test_what_is_kept_for_the_backward_pass(part: str, expected: list[tuple[int, ...]]) -> None:
    """Of a projection x and x A'; of an MLP x, gate(x) and up(x) [48 wide] and the three products with A; of a norm x,
    1 / rms(x) and the factor (Gemma's 1 + weight). The modules' own keep at least as much."""
    model = build("gemma2")
    before = kept(find(model, part))
    now = kept(find(fuse(model), part))
    assert now == sorted(expected)
    assert count_numbers(now) <= count_numbers(before)
    assert (now == before) is (part != "mlp"), "in float32 the others have nothing to cast"


def count_numbers(shapes: list[tuple[int, ...]]) -> int:
    return sum(int(torch.Size(shape).numel()) for shape in shapes)


@pytest.mark.parametrize(
    ("part", "numbers", "less"),
    [("self_attn.q_proj", 32 + RANK, 1.5), ("mlp", 32 + 2 * 48 + 3 * RANK, 2), ("input_layernorm", 32 + 2, 1.5)],
)
def test_in_bfloat16_no_wider_copy_is_kept(part: str, numbers: int, less: float) -> None:
    """Rows in bfloat16, 1 / rms(x) in float32 (two numbers of bfloat16); the modules' own keep more by a factor."""
    model = build("llama", torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        own = kept_bytes(find(model, part))
        with torch.no_grad():
            fused.fuse(model)
        now = kept_bytes(find(model, part))
    assert now == 2 * LENGTH * numbers
    assert own > less * now


def kept_bytes(module: Any) -> int:
    weights = {parameter.data_ptr() for parameter in module.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    x = torch.randn(1, LENGTH, 32, generator=torch.Generator().manual_seed(5)).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    return sum(seen.values())


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_undo_puts_everything_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    before = [dict(module.__dict__) for module in model.modules()]
    own = compute_layer(model)
    fuse(fuse(model))
    assert [dict(module.__dict__) for module in model.modules()] != before
    fused.undo(model)
    assert [dict(module.__dict__) for module in model.modules()] == before
    calls = count_calls(monkeypatch)
    assert torch.equal(compute_layer(model), own)
    assert calls == []


def test_undo_gives_back_a_forward_pass_that_was_put_there_before() -> None:
    """As accelerate's hooks are, which move weights to a device."""
    model = build()
    module = find(model, "self_attn.q_proj")
    own = module.forward
    calls: list[int] = []

    def hooked(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    module.forward = hooked
    fused.undo(fuse(model))
    compute(module)
    assert calls


def test_an_exported_adapter_and_the_names_of_the_weights_are_the_same(tmp_path: Path) -> None:
    model = build()
    names = [*model.state_dict()]
    model.save_pretrained(tmp_path / "own")
    fuse(model)
    assert [*model.state_dict()] == names
    model.save_pretrained(tmp_path / "fused")
    own, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("own", "fused"))
    assert own.keys() == ours.keys()
    assert all(torch.equal(own[name], ours[name]) for name in own)
    other = build(r=3)
    fuse(other).save_pretrained(tmp_path / "other")
    assert (
        load_file(tmp_path / "other" / "adapter_model.safetensors")[next(iter(own))].shape != own[next(iter(own))].shape
    )


def test_an_optimizer_step_is_seen_by_the_next_pass() -> None:
    """Nothing of the adapter is kept from one call to the next."""
    model = build()
    module = find(fuse(model), "mlp")
    first = compute(module)["y"]
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(1.1)
    second = compute(module)["y"]
    fused.undo(model)
    assert relative(second, first) > 1e-3
    assert relative(second, compute(module)["y"]) < EXACT
