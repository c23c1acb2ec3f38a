"""Scores of tokens from hidden states against their definition in float64, and their gradient against autograd's.

Every comparison is also made with one thing left out of the definition, and must then fail: a test that could not see a
missing bias, scale or softcap would prove nothing.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from politune.models import scoring
from tiny import tiny_models

COUNT, HIDDEN, VOCABULARY = 100, 24, 70
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 3.0},
    "all": {"bias": True, "scale": 0.3, "softcap": 3.0},
}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_layer(bias: bool = False, **settings: Any) -> scoring.OutputLayer:
    weight = draw(VOCABULARY, HIDDEN, seed=1) / 2
    return scoring.OutputLayer(weight, draw(VOCABULARY, seed=2) if bias else None, **settings)


def make_rows() -> tuple[Tensor, Tensor]:
    targets = torch.randint(VOCABULARY, (COUNT,), generator=torch.Generator().manual_seed(4))
    return draw(COUNT, HIDDEN, seed=3), targets


def define(hidden: Tensor, targets: Tensor, layer: scoring.OutputLayer) -> dict[str, Tensor]:
    """What the scores are, written out in float64."""
    logits = hidden.double() @ layer.weight.double().t()
    if layer.bias is not None:
        logits = logits + layer.bias.double()
    logits = logits * layer.scale
    if layer.softcap is not None:
        logits = layer.softcap * torch.tanh(logits / layer.softcap)
    everything = torch.log_softmax(logits, -1)
    return {
        "log_probs": everything.gather(1, targets.unsqueeze(1)).squeeze(1),
        "entropy": -(everything.exp() * everything).sum(-1),
        "mean_logits": logits.mean(-1),
        "is_top1": logits.argmax(-1) == targets,
        "log_sum_sq_probs": (2 * everything).logsumexp(-1),
    }


def find_differences(found: scoring.Scores, expected: dict[str, Tensor]) -> list[str]:
    """The names of the scores that are off: log-probabilities by 1e-5 of each, the others by 1e-5 of the largest."""
    wrong = []
    for name, values in expected.items():
        mine = getattr(found, name)
        if values.dtype == torch.bool:
            near = mine == values
        else:
            near = (mine - values).abs() <= 1e-5 * (values.abs() if name == "log_probs" else values.abs().max())
        if not bool(near.all()):
            wrong.append(name)
    return wrong


@pytest.fixture(params=["one tile", "many tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many tiles":
        monkeypatch.setattr(scoring, "CPU_TILE", (7, 16))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("kind", LAYERS)
def test_scores_are_what_their_definition_says(kind: str) -> None:
    hidden, targets = make_rows()
    layer = make_layer(**LAYERS[kind])
    assert not find_differences(scoring.score(hidden, targets, layer, squares=True), define(hidden, targets, layer))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("kind", LAYERS)
def test_the_gradient_is_autograds(kind: str) -> None:
    """Of a weighting with both signs and a zero, against the definition's gradient in float64."""
    hidden, targets = make_rows()
    layer = make_layer(**LAYERS[kind])
    weights = draw(COUNT, seed=5)
    weights[7] = 0
    mine, plain = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    (scoring.score(mine, targets, layer).log_probs * weights).sum().backward()
    (define(plain, targets, layer)["log_probs"] * weights).sum().backward()
    assert mine.grad is not None
    assert plain.grad is not None
    assert (mine.grad - plain.grad).abs().max() < 1e-5 * plain.grad.abs().max()
    assert not mine.grad[7].any()


@pytest.mark.parametrize("left_out", ["bias", "scale", "softcap"])
def test_a_step_left_out_of_the_definition_is_seen(left_out: str) -> None:
    """The control of the two tests above: in values and in gradient."""
    hidden, targets = make_rows()
    layer = make_layer(**LAYERS["all"])
    lesser = make_layer(**{key: value for key, value in LAYERS["all"].items() if key != left_out})
    found = scoring.score(hidden, targets, layer, squares=True)
    assert find_differences(found, define(hidden, targets, lesser))[:2] == ["log_probs", "entropy"]
    gradients = []
    for one in (layer, lesser):
        rows = hidden.clone().requires_grad_()
        scoring.score(rows, targets, one).log_probs.sum().backward()
        gradients.append(rows.grad)
    assert (gradients[0] - gradients[1]).abs().max() > 1e-2 * gradients[0].abs().max()  # type: ignore[operator,union-attr]


def test_another_target_is_seen() -> None:
    hidden, targets = make_rows()
    layer = make_layer()
    other = targets.clone()
    other[-1] = (other[-1] + 1) % VOCABULARY
    found = scoring.score(hidden, other, layer, squares=True)
    assert find_differences(found, define(hidden, targets, layer)) == ["log_probs"]


def test_only_the_log_probabilities_have_a_gradient() -> None:
    hidden, targets = make_rows()
    found = scoring.score(hidden.requires_grad_(), targets, make_layer(), squares=True)
    assert found.log_probs.requires_grad
    assert found.log_sum_sq_probs is not None
    for other in (found.entropy, found.mean_logits, found.is_top1, found.log_sum_sq_probs):
        assert not other.requires_grad
    assert scoring.score(hidden, targets, make_layer()).log_sum_sq_probs is None


@pytest.mark.parametrize("columns", [1, 2, 3, 4])
def test_of_equally_likely_tokens_the_first_is_the_top_one(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens 1 and 3 have the same weights, small integers, so that their logits are the same number.

    TRL counts the target as hit where no token before it is as likely; token 3 is then a miss and token 1 a hit.
    """
    monkeypatch.setattr(scoring, "CPU_TILE", (2, columns))
    weight = torch.tensor([[0.0, 1.0], [2.0, 1.0], [1.0, 0.0], [2.0, 1.0]])
    hidden = torch.tensor([[1.0, 2.0]]).expand(3, 2)
    found = scoring.score(hidden, torch.tensor([1, 3, 0]), scoring.OutputLayer(weight))
    assert found.is_top1.tolist() == [True, False, False]


@pytest.mark.parametrize("columns", [1, 2])
def test_logits_far_apart_give_finite_scores(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of 0 and 300: the unlikely target's log-probability is -300 to float32's precision, its probability 0."""
    monkeypatch.setattr(scoring, "CPU_TILE", (2, columns))
    weight = torch.tensor([[0.0], [300.0]])
    hidden = torch.ones(2, 1).requires_grad_()
    found = scoring.score(hidden, torch.tensor([0, 1]), scoring.OutputLayer(weight), squares=True)
    assert found.log_probs.tolist() == [-300.0, 0.0]
    assert found.entropy.tolist() == pytest.approx([0.0, 0.0], abs=1e-4)
    found.log_probs.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.flatten().tolist() == [-300.0, 0.0]


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_scores_are_near_the_exact_ones(hidden_dtype: torch.dtype) -> None:
    """A bfloat16 layer, also under autocast: products are rounded to 8 bits, so that logits of size 5 are off by 0.02."""
    hidden, targets = make_rows()
    layer = scoring.OutputLayer(make_layer().weight.bfloat16())
    rounded = hidden.bfloat16().to(hidden_dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=hidden_dtype == torch.float32):
        found = scoring.score(rounded.requires_grad_(), targets, layer)
    exact = define(rounded.detach(), targets, layer)
    assert found.log_probs.dtype == torch.float32
    assert (found.log_probs - exact["log_probs"]).abs().max() < 0.15
    assert (found.log_probs - exact["log_probs"]).abs().mean() < 0.03


def test_no_target_at_all_is_no_error() -> None:
    """A batch whose every completion was cut off."""
    hidden, targets = draw(0, HIDDEN, seed=0).requires_grad_(), torch.zeros(0, dtype=torch.long)
    found = scoring.score(hidden, targets, make_layer(), squares=True)
    found.log_probs.sum().backward()
    assert found.log_probs.shape == (0,)
    assert hidden.grad is not None


@pytest.mark.parametrize(("name", "scale", "softcap"), [("llama", 1, None), ("granite", 1 / 3, None), ("gemma2", 1, 6)])
def test_the_output_layer_is_read_from_the_model(name: str, scale: float, softcap: float | None) -> None:
    model = tiny_models.build_causal(name)
    layer = scoring.output_layer(model)
    assert layer.weight is model.get_output_embeddings().weight
    assert layer.scale == pytest.approx(scale)
    assert layer.softcap == softcap
