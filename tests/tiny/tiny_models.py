"""Two-layer checkpoints with the tokens, template and config of their families, built in well under a second each.

They are what a user's base model looks like on disk: safetensors, tokenizer, chat template, generation config. The
weights are random (std 0.1, so that logits differ visibly from one another) and depend on the seed only.
"""

from pathlib import Path
from typing import Any

SENTENCES = (
    "Should the state raise the minimum wage, or leave wages to the market?",
    "A public health service should be paid for by taxes, so that nobody is left out.",
    "Taxes should be low, so that families keep what they earn and decide for themselves.",
    "Write a short answer to the question. What is your view on the rent of homes?",
    "You are a helpful assistant. The user asks a question and the assistant answers it.",
    "Water boils at one hundred degrees, and the train to the sea leaves at nine.",
)
LLAMA_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
MISTRAL_TOKENS = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")
LLAMA_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
MISTRAL_TEMPLATE = (
    "{%- set told = namespace(system='') %}"
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'system' %}{%- set told.system = message['content'] + '\n\n' %}"
    "{%- elif message['role'] == 'user' %}"
    "{{- '[INST] ' + told.system + message['content'] + '[/INST]' }}{%- set told.system = '' %}"
    "{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] | trim + eos_token }}"
    "{%- else %}{{- raise_exception('unknown role ' + message['role']) }}{%- endif %}"
    "{%- endfor %}"
)


def make_llama(path: Path, seed: int, *, tied: bool = False, dtype: str = "float32", **config: Any) -> Path:
    """A Llama-3-like checkpoint (grouped-query attention, no pad token, two end tokens); returns `path`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer(LLAMA_TOKENS, bos="<|begin_of_text|>", eos="<|eot_id|>", unk=None, template=LLAMA_TEMPLATE)
    shape = LlamaConfig(
        **{**_shape(tokenizer), "tie_word_embeddings": tied, "rope_parameters": _rope(500_000.0), **config}
    )
    generation = {"eos_token_id": [1, 4], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    return _save(LlamaForCausalLM, shape, tokenizer, generation, path, seed, dtype)


def make_mistral(path: Path, seed: int, *, tied: bool = False, dtype: str = "float32", **config: Any) -> Path:
    """A Mistral-7B-Instruct-like checkpoint (no system role of its own, no pad token); returns `path`."""
    from transformers import MistralConfig, MistralForCausalLM

    tokenizer = _tokenizer(MISTRAL_TOKENS, bos="<s>", eos="</s>", unk="<unk>", template=MISTRAL_TEMPLATE)
    shape = MistralConfig(
        **{
            **_shape(tokenizer),
            "tie_word_embeddings": tied,
            "rope_parameters": _rope(1_000_000.0),
            "sliding_window": None,
            **config,
        }
    )
    # The same seed would give the weights of the tiny Llama: the two families share their tensors' names and shapes.
    return _save(MistralForCausalLM, shape, tokenizer, {}, path, seed + 1_000_000, dtype)


def make_adapter(
    path: Path, base: Path, seed: int, *, metadata: dict[str, str] | None = None, std: float = 0.1, **lora: Any
) -> Path:
    """A LoRA adapter of `base` with random A and B (PEFT starts B at zero, which merges to nothing); returns `path`.

    `metadata` goes into the header of adapter_model.safetensors, as an export of a run writes it.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    peft_model = get_peft_model(model, LoraConfig(**{**settings, **lora}))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * std
    peft_model.save_pretrained(path, save_embedding_layers=False)
    weights = path / "adapter_model.safetensors"
    save_file(load_file(weights), weights, metadata={"format": "pt", **(metadata or {})})
    return path


def _tokenizer(special: tuple[str, ...], *, bos: str, eos: str, unk: str | None, template: str) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[AddedToken(token, special=True) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        chat_template=template,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
        model_input_names=["input_ids", "attention_mask"],
    )


def _shape(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,  # bitsandbytes on the CPU wants whole blocks of 64
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.1,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


def _save(
    architecture: Any, shape: Any, tokenizer: Any, generation: dict[str, Any], path: Path, seed: int, dtype: str
) -> Path:
    import torch
    from transformers import GenerationConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = architecture(shape).to(getattr(torch, dtype))
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model.generation_config = GenerationConfig(**{**ends, **generation})
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


# Shapes of families whose attention differs, in memory: hidden 32 to 72, two layers, windows smaller than the tests' rows.
_SMALL: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 16, "sliding_window": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 6.0,
         "query_pre_attn_scalar": 16},
    ),
    "gemma3": ("Gemma3", {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    "smollm": (
        "Llama",
        {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    ),
    "granite": ("Granite", {"logits_scaling": 3.0}),
    "phi3": ("Phi3", {}),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
    "bloom": ("Bloom", {"n_layer": 2, "n_head": 4}),
    "doge": ("Doge", {"sliding_window": 64}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}  # fmt: skip


def build_causal(name: str, seed: int = 0, *, std: float = 0.2, **config: Any) -> Any:
    """A causal language model of a family in memory, float32, in training mode, every weight matrix random and frozen."""
    import torch
    import transformers

    family, own = _ARCHITECTURES[name]
    settings = {**_SMALL, **own, **config}
    if family == "Bloom":
        settings = {key: value for key, value in settings.items() if not key.startswith(("num_", "interm", "max_"))}
    config_name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, config_name)(**settings))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0, std)
    return model.requires_grad_(False).train()
