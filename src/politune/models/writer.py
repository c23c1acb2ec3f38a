"""Text that a model writes on from given tokens: greedily, or drawn with a seed.

Contexts of one length are written on together, so that nothing is padded.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Ids: TypeAlias = tuple[int, ...]
AT_ONCE = 16


@dataclass(frozen=True)
class Written:
    """What follows a context, without special tokens.

    Args:
        ended: whether the model ended it; else it met the limit.
        tokens: that it has, without the one that ends it.
    """

    text: str
    ended: bool
    tokens: int


class Writer:
    """Writes with a model; its mode, its random state and its weights are left as they are.

    Args:
        model: a causal language model, with or without PEFT's adapter.
        tokenizer: its own.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def write(
        self,
        contexts: Sequence[Ids],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int | str = 0,
    ) -> list[str]:
        """The texts of `written`, which takes the same."""
        given = self.written(contexts, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        return [each.text for each in given]

    def written(
        self,
        contexts: Sequence[Ids],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int | str = 0,
    ) -> list[Written]:
        """What follows each context.

        Args:
            contexts: token ids, each at least one.
            max_new_tokens: the longest text.
            temperature: the logits are divided by it before a token is drawn from all of the vocabulary; 0 takes the likeliest.
            seed: of the draws.
        """
        import torch

        of_length: dict[int, list[int]] = defaultdict(list)
        for number, context in enumerate(contexts):
            of_length[len(context)].append(number)
        drawn = (
            {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "min_p": None, "typical_p": 1.0}
            if temperature
            else {"do_sample": False}
        )
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        found: dict[int, Written] = {}
        done = 0
        for length in sorted(of_length):
            for start in range(0, len(of_length[length]), AT_ONCE):
                numbers = of_length[length][start : start + AT_ONCE]
                inputs = torch.tensor([contexts[number] for number in numbers], device=self.model.device)
                with torch.no_grad(), torch.random.fork_rng():
                    torch.manual_seed(_mixed(seed, done))
                    out = self.model.generate(
                        input_ids=inputs,
                        attention_mask=torch.ones_like(inputs),
                        max_new_tokens=max_new_tokens,
                        repetition_penalty=1.0,
                        pad_token_id=self.tokenizer.pad_token_id,
                        **drawn,
                    )
                for number, tokens in zip(numbers, out[:, length:].tolist(), strict=True):
                    end = next((place for place, token in enumerate(tokens) if token in ends), None)
                    text = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
                    found[number] = Written(text, end is not None, len(tokens) if end is None else end)
                done += len(numbers)
        return [found[number] for number in range(len(contexts))]


def _mixed(seed: int | str, place: int) -> int:
    """A seed of 32 bits (a CPU's generator takes no more of one); batches of different seeds share no draws."""
    return int.from_bytes(hashlib.sha256(f"{seed} {place}".encode()).digest()[:4], "big")
