"""A Llama or GPT-2 of transformers for llama.cpp: as GGUF in 16 bits, and quantized by llama.cpp itself.

Runs in llama.cpp's environment (packages `gguf`, `llama-cpp-python`, `numpy`) and imports nothing of the
project. Weights are random, so the order in which rotary channels lie doesn't matter and is left as it is.

    python llama_cpp_model.py write SOURCE OUT.gguf
    python llama_cpp_model.py quantize IN.gguf OUT.gguf FORMAT_NUMBER
    python llama_cpp_model.py logits MODEL.gguf IDS.npy OUT.npy
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_tensors(path: Path) -> Iterator[tuple[str, Any]]:
    """Name and float32 array of every tensor of a bfloat16 safetensors file."""
    import numpy as np

    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            file.seek(8 + size + first)
            halves = np.frombuffer(file.read(last - first), dtype=np.uint16)
            yield name, (halves.astype(np.uint32) << 16).view(np.float32).reshape(entry["shape"])


def add_hyperparameters(writer: Any, config: dict[str, Any]) -> None:
    """Sizes of a Llama or GPT-2, of a head and of the vocabulary."""
    if config["model_type"] == "gpt2":
        blocks, width, heads = config["n_layer"], config["n_embd"], config["n_head"]
        writer.add_context_length(config["n_positions"])
        writer.add_feed_forward_length(4 * width)
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    else:
        blocks, width, heads = (
            config[name] for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")
        )
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_dimension_count(width // heads)
    writer.add_block_count(blocks)
    writer.add_embedding_length(width)
    writer.add_head_count(heads)
    writer.add_vocab_size(config["vocab_size"])


def write(source: str, target: str) -> None:
    """The model in `source` as one GGUF file."""
    import gguf
    import numpy as np

    config = json.loads((Path(source) / "config.json").read_text())
    is_gpt2 = config["model_type"] == "gpt2"
    architecture = gguf.MODEL_ARCH.GPT2 if is_gpt2 else gguf.MODEL_ARCH.LLAMA
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[architecture])
    add_hyperparameters(writer, config)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    tokens = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % value for value in range(256))]
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    rest = config["vocab_size"] - len(tokens)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*tokens, *(b"t%d" % number for number in range(rest))])
    writer.add_token_scores([0.0] * config["vocab_size"])
    writer.add_token_types([*kinds, *[gguf.TokenType.NORMAL] * rest])
    blocks = config["n_layer" if is_gpt2 else "num_hidden_layers"]
    names = gguf.get_tensor_name_map(architecture, blocks)
    for path in sorted(Path(source).glob("*.safetensors")):
        for name, values in read_tensors(path):
            theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if is_gpt2 and name.startswith("transformer.h.") and values.ndim == 2:
                values = values.T  # stored [in, out]
            kind = np.float32 if values.ndim == 1 else np.float16
            writer.add_tensor(theirs, np.ascontiguousarray(values, dtype=kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: str, target: str, format_number: str) -> None:
    """`source` in one of llama.cpp's formats, by its number."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = int(format_number), 2
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), settings) != 0:
        raise SystemExit("llama_model_quantize failed")


def logits(model: str, ids: str, target: str) -> None:
    """Logits ``[windows, tokens, vocab]`` of every position of every window of token ids."""
    import llama_cpp as api
    import numpy as np

    windows = np.load(ids)
    count, tokens = windows.shape
    loaded = api.llama_model_load_from_file(model.encode(), api.llama_model_default_params())
    settings = api.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = tokens, tokens, tokens
    settings.n_threads = settings.n_threads_batch = 2
    settings.type_k = settings.type_v = 0  # float32, so that only the inputs of linears are rounded
    context = api.llama_init_from_model(loaded, settings)
    vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(loaded))
    found = np.empty((count, tokens, vocabulary), np.float32)
    batch = api.llama_batch_init(tokens, 0, 1)
    for index, window in enumerate(windows):
        api.llama_memory_clear(api.llama_get_memory(context), True)
        batch.n_tokens = tokens
        for position, token in enumerate(window):
            batch.token[position], batch.pos[position], batch.logits[position] = int(token), position, True
            batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
        if api.llama_decode(context, batch) != 0:
            raise SystemExit("llama_decode failed")
        for position in range(tokens):
            row = api.llama_get_logits_ith(context, position)
            found[index, position] = np.ctypeslib.as_array(row, (vocabulary,))
    np.save(target, found)


if __name__ == "__main__":
    {"write": write, "quantize": quantize, "logits": logits}[sys.argv[1]](*sys.argv[2:])
