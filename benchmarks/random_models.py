"""Checkpoints of any size with random weights, Llama and GPT-2: right for time, useless for quality.

Written block by block, one shard per block, so that making a model of billions of parameters takes the
memory of one block. The tokenizer has one token per byte; the vocabulary beyond it exists for its size only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, PreTrainedTokenizerFast

BEGIN, END = 256, 257
#: Standard deviation of the weights, as transformers starts a Llama.
SPREAD = 0.02


@dataclass(frozen=True)
class Shape:
    """Numbers of blocks, of features between and inside feed-forward layers, of query and of key heads."""

    kind: str
    blocks: int
    width: int
    inner: int
    heads: int
    kv_heads: int

    @property
    def kv_bytes(self) -> int:
        """Of the keys and values of a token, in 16 bits."""
        return 2 * 2 * self.blocks * self.width // self.heads * self.kv_heads

    @property
    def weights(self) -> int:
        """Of the linears of all blocks."""
        keys = self.width // self.heads * self.kv_heads
        attention = 2 * self.width * (self.width + keys)
        return self.blocks * (attention + (2 if self.kind == "gpt2" else 3) * self.width * self.inner)


def write_random_llama(
    directory: Path,
    *,
    blocks: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    vocabulary: int = 32_000,
    context: int = 256,
    tied: bool = False,
    seed: int = 0,
) -> Path:
    """Write a bf16 Llama with random weights, config and byte tokenizer; returns `directory`.

    Parameters
    ----------
    directory : Path
        Made where it doesn't exist.
    blocks, hidden, intermediate, heads, kv_heads : int
        Numbers of blocks, of features between and inside feed-forward layers, of query and of key heads.
    vocabulary : int
        At least 258.
    context : int
        Most positions.
    tied : bool
        One tensor for embedding and head.
    seed : int
        The same seed gives the same bytes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    key_width = hidden // heads * kv_heads

    def weight(rows: int, columns: int) -> Tensor:
        return torch.empty(rows, columns, dtype=torch.bfloat16).normal_(0, SPREAD, generator=generator)

    def norm() -> Tensor:
        return torch.ones(hidden, dtype=torch.bfloat16)

    count = blocks + 2
    index: dict[str, str] = {}
    total = 0

    def write(number: int, tensors: dict[str, Tensor]) -> None:
        nonlocal total
        file = f"model-{number:05d}-of-{count:05d}.safetensors"
        save_file(tensors, directory / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, file))
        total += sum(tensor.nbytes for tensor in tensors.values())

    write(1, {"model.embed_tokens.weight": weight(vocabulary, hidden)})
    for block in range(blocks):
        linears = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (key_width, hidden),
            "self_attn.v_proj": (key_width, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (intermediate, hidden),
            "mlp.up_proj": (intermediate, hidden),
            "mlp.down_proj": (hidden, intermediate),
        }
        prefix = f"model.layers.{block}"
        tensors = {f"{prefix}.{name}.weight": weight(*shape) for name, shape in linears.items()}
        tensors[f"{prefix}.input_layernorm.weight"] = norm()
        tensors[f"{prefix}.post_attention_layernorm.weight"] = norm()
        write(block + 2, tensors)
    ends = {"model.norm.weight": norm()}
    if not tied:
        ends["lm_head.weight"] = weight(vocabulary, hidden)
    write(count, ends)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}, indent=1)
    )
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        bos_token_id=BEGIN,
        eos_token_id=END,
    ).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def write_random_gpt2(
    directory: Path, *, blocks: int, hidden: int, heads: int, vocabulary: int = 32_000, context: int = 256
) -> Path:
    """Write a bf16 GPT-2 with random weights, tied as GPT-2 is; parameters as of `write_random_llama`."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=context, n_embd=hidden, n_layer=blocks, n_head=heads,
        bos_token_id=BEGIN, eos_token_id=END, dtype="bfloat16",
    )  # fmt: skip
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def write_random(shape: Shape, directory: Path, context: int) -> Path:
    """A model of that shape, with a vocabulary of 32,000."""
    if shape.kind == "gpt2":
        return write_random_gpt2(
            directory, blocks=shape.blocks, hidden=shape.width, heads=shape.heads, context=context
        )
    return write_random_llama(
        directory, blocks=shape.blocks, hidden=shape.width, intermediate=shape.inner, heads=shape.heads,
        kv_heads=shape.kv_heads, context=context,
    )  # fmt: skip


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and one each for begin and end."""
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
