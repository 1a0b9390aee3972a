"""llama.cpp's quantization of a trained Llama by its own tools, and what the blocks that it stores stand for.

Runs in llama.cpp's environment (packages `gguf` and `torch`; `llama-imatrix` and `llama-quantize` beside its
`python`) and imports nothing of the project. The importance matrix comes from exactly the windows that the
other programs get: each token is a word of its own in the file's vocabulary, ``<17>`` for the token 17, which
llama.cpp takes whole. Embedding and head are 16-bit, so that the linears alone differ.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from llama_cpp_model import add_hyperparameters

#: subject -> bits -> llama.cpp's name of the format
FORMATS = {
    "llamacpp": {2: "Q2_K", 3: "Q3_K_M", 4: "Q4_K_M", 6: "Q6_K", 8: "Q8_0"},
    "llamacpp-plain": {2: "Q2_K", 3: "Q3_K_M", 4: "Q4_K_M", 6: "Q6_K", 8: "Q8_0"},
    "llamacpp-iq": {2: "IQ2_XS", 3: "IQ3_XS", 4: "IQ4_XS"},
}
#: Subjects that look at no text.
WITHOUT_IMPORTANCE = ("llamacpp-plain",)


def run_tool(name: str, *arguments: str | Path) -> str:
    """What one of llama.cpp's tools prints; where it fails, its last lines."""
    command = [str(Path(sys.executable).with_name(name)), *map(str, arguments)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"{name}: status {ran.returncode}: " + " / ".join(ran.stdout.splitlines()[-3:]))
    return ran.stdout


def version() -> str:
    """Of llama.cpp."""
    return run_tool("llama-imatrix", "--version").splitlines()[0].removeprefix("version: ")


def pairs_together(rows: Any, heads: int) -> Any:
    """Rows of q or k ``[heads * d, in]`` with i and i + d/2, which are rotated together, side by side."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def pairs_apart(rows: Any, heads: int) -> Any:
    """Undoes `pairs_together`."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def rotary_heads(name: str, config: dict[str, Any]) -> int | None:
    """Heads of a q or k projection; None for what isn't rotated."""
    role = name.split(".")[-1]
    return {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}.get(role)


def their_name(name: str, config: dict[str, Any]) -> str:
    """Name of a module of a Llama in GGUF."""
    import gguf

    found: str = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"]).get_name(name)
    return found


def write(model: Any, config: dict[str, Any], target: Path) -> None:
    """transformers' Llama as a GGUF file in float32, its tokens written ``<0>``, ``<1>`` and so on."""
    import gguf

    writer = gguf.GGUFWriter(str(target), "llama")
    add_hyperparameters(writer, config)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    size = config["vocab_size"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{token}>".encode() for token in range(size)])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([gguf.TokenType.USER_DEFINED] * size)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    tied = config["tie_word_embeddings"]
    for name, values in model.state_dict().items():
        module = name.removesuffix(".weight")
        if tied and module == "lm_head":
            continue
        heads = rotary_heads(module, config)
        rows = values.float() if heads is None else pairs_together(values.float(), heads)
        writer.add_tensor(f"{their_name(module, config)}.weight", rows.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def importance(source: Path, ids: Any, target: Path) -> None:
    """llama.cpp's importance matrix over windows of tokens ``[windows, length]``."""
    import gguf
    import torch

    text = target.with_suffix(".txt")
    text.write_text("".join(f"<{token}>" for token in ids.flatten().tolist()))
    length, threads = str(ids.shape[1]), str(torch.get_num_threads())
    run_tool("llama-imatrix", "-m", source, "-f", text, "-o", target, "-c", length, "-t", threads, "--no-ppl")
    found = gguf.GGUFReader(target).fields["imatrix.chunk_count"].contents()
    if found != len(ids):
        raise SystemExit(f"llama.cpp read {found} windows of {len(ids)}")


def read(target: Path, linears: list[str], config: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """Weights in float32 by name, and what one takes in the file, in bits."""
    import gguf
    import torch

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(target).tensors}
    weights, bits, count = {}, 0, 0
    for name in linears:
        tensor = stored[f"{their_name(name, config)}.weight"]
        rows = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        heads = rotary_heads(name, config)
        weights[name] = rows if heads is None else pairs_apart(rows, heads)
        bits += 8 * int(tensor.n_bytes)
        count += rows.numel()
    return weights, bits / count


def quantize(model: Any, settings: dict[str, Any], ids: Any) -> tuple[dict[str, Any], float]:
    """Dequantized linears and bits per weight, in the format that a subject has for so many bits."""
    config = json.loads((Path(settings["model"]) / "config.json").read_text())
    if config["model_type"] != "llama":
        raise SystemExit(f"a model of type {config['model_type']}, and only Llamas are written here")
    folder = Path(settings["output"]).parent
    source, target, matrix = folder / "source.gguf", folder / "target.gguf", folder / "importance.gguf"
    write(model, config, source)
    options: list[str | Path] = ["--token-embedding-type", "f16", "--output-tensor-type", "f16"]
    if settings["subject"] not in WITHOUT_IMPORTANCE:
        importance(source, ids, matrix)
        options += ["--imatrix", matrix]
    run_tool("llama-quantize", *options, source, target, FORMATS[settings["subject"]][settings["bits"]])
    return read(target, settings["linears"], config)
