"""Small random models, one per supported architecture, and a byte tokenizer for them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tailorbird.calibrate.ledger import Ledger

BASE: dict[str, Any] = {"vocab_size": 258, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
DECODER: dict[str, Any] = {
    **BASE,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}

#: architecture name -> arguments of its config; every one that the documentation promises
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": DECODER,
    "mistral": {**DECODER, "sliding_window": 16},
    "qwen2": {**DECODER, "tie_word_embeddings": True},
    "qwen3": {**DECODER, "head_dim": 16},
    "gemma2": {**DECODER, "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {**DECODER, "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16},
    "phi3": DECODER,
    "gpt2": {**BASE, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": {
        **BASE,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
    "opt": {
        **BASE,
        "hidden_size": 64,
        "ffn_dim": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 64,
    },
    "falcon": {
        **BASE,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
    },
    "stablelm": DECODER,
    "olmo": DECODER,
    "olmo2": DECODER,
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte (258 with begin and end): every text encodes, nothing is learned."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)} | {"<s>": 256, "</s>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def make_config(architecture: str, **changes: Any) -> Any:
    return AutoConfig.for_model(architecture, **{**ARCHITECTURES[architecture], **changes})


def make_model(architecture: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model whose biases and norms are random too, so that a forgotten one shows."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(architecture, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).eval()


def save_model(directory: Path, architecture: str = "llama", **changes: Any) -> Path:
    """Save `make_model(...)` with the byte tokenizer in Hugging Face layout; returns `directory`."""
    model = make_model(architecture, **changes)
    model.config.dtype = next(model.parameters()).dtype
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def fresh(folder: Path) -> Ledger:
    """A ledger of its own below `folder`."""
    return Ledger(Path(tempfile.mkdtemp(dir=folder)))


def untie(model: Any) -> None:
    """Give the head of a transformers model a weight of its own, equal to the one it may share."""
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
