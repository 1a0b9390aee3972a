"""Writes a GGUF file: metadata, tokenizer and tensors, for the architectures that llama.cpp knows.

Only what carries over exactly is written; the rest is refused by name. How weights become blocks is
in `formats/gguf.py`. Names of keys and tensors come from the `gguf` package.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailorbird.compress.stored_model import Matrix, StoredModel
from tailorbird.errors import CheckpointError, ExportError
from tailorbird.formats import gguf as blocks
from tailorbird.formats.packed import IntegerCoding, PackedWeight
from tailorbird.model.json_file import read_json

#: model_type -> architecture in GGUF
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
#: architectures whose q and k rows GGUF has in another order
_INTERLEAVED = ("llama",)
_ROPE_TYPES = ("default", "linear", "llama3")
_REMEDY = "export to `dense` or `compressed-tensors` instead"

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
#: pattern that splits text before byte-pair encoding -> llama.cpp's name for it
_SPLITS = {_LETTERS + r"\p{N}{1,3}" + _REST: "llama-bpe", _LETTERS + r"\p{N}" + _REST: "qwen2"}
#: llama.cpp looks whole words up before it merges with these, and only with these
_WHOLE_WORDS_FIRST = ("llama-bpe",)


def check_architecture(config: Any) -> None:
    """Raise ExportError unless llama.cpp runs this model as transformers does.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
    """

    def refuse(given: str, expected: str) -> ExportError:
        return ExportError(given, expected, _REMEDY)

    if config.model_type not in ARCHITECTURES:
        raise refuse(f"GGUF of a model of type `{config.model_type}`", "one of " + ", ".join(ARCHITECTURES))
    if config.hidden_act != "silu":
        raise refuse(f"activation `{config.hidden_act}`", "`silu`, as llama.cpp has it for this architecture")
    rope = _rope(config)
    if rope["rope_type"] not in _ROPE_TYPES:
        raise refuse(f"rotary scaling `{rope['rope_type']}`", "one of " + ", ".join(_ROPE_TYPES))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise refuse("rotation of a part of each head", "rotation of the whole head")
    if getattr(config, "use_sliding_window", False) or "sliding_attention" in (
        getattr(config, "layer_types", None) or ()
    ):
        raise refuse("sliding windows", "full attention in every block")


def _rope(config: Any) -> dict[str, Any]:
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    return {"rope_type": "default", "rope_theta": 10000.0} | parameters


# --- tokenizer -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE tokenizer in GGUF's terms.

    Attributes
    ----------
    pre : str
        llama.cpp's name for the split before encoding.
    tokens : list of str
        One per row of the embedding.
    types : list of int
        `gguf.TokenType` of each.
    merges : list of str
        `left right`, in order of rank.
    notes : list of str
    """

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    notes: list[str]


def read_vocabulary(data: dict[str, Any], size: int) -> Vocabulary:
    """Translate a `tokenizer.json`.

    Parameters
    ----------
    data : dict
        Its content.
    size : int
        Rows of the embedding; tokens beyond the tokenizer's are marked as unused.

    Raises
    ------
    ExportError
        It isn't a byte-level BPE that llama.cpp encodes with as transformers does; names the part.
    """
    from gguf import TokenType

    model = data.get("model") or {}
    if model.get("type") != "BPE":
        raise _tokenizer_refused(f"of type {model.get('type')!r}", "byte-level BPE")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout", "byte_fallback"):
        if model.get(key):
            raise _tokenizer_refused(f"with `{key}`", "plain byte-level BPE")
    pre = _split_name(data.get("pre_tokenizer"))
    if bool(model.get("ignore_merges")) != (pre in _WHOLE_WORDS_FIRST):
        raise _tokenizer_refused(
            f"`{pre}` with ignore_merges {bool(model.get('ignore_merges'))}",
            "llama.cpp's way with this split",
        )
    notes = []
    normalizer = (data.get("normalizer") or {}).get("type")
    if normalizer == "NFC":
        notes.append("llama.cpp doesn't apply the tokenizer's NFC normalization: pass composed text")
    elif normalizer is not None:
        raise _tokenizer_refused(f"with the normalizer {normalizer!r}", "none, or NFC")
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [int(TokenType.UNUSED)] * size

    def put(index: int, token: str, kind: TokenType) -> None:
        if not 0 <= index < size:
            raise CheckpointError(
                f"token {token!r} has the id {index}", f"ids below {size}", "take the model's own tokenizer"
            )
        tokens[index], types[index] = token, int(kind)

    for token, index in model["vocab"].items():
        put(index, token, TokenType.NORMAL)
    for added in data.get("added_tokens") or ():
        kind = TokenType.CONTROL if added.get("special") else TokenType.USER_DEFINED
        put(added["id"], added["content"], kind)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or ()]
    return Vocabulary(pre, tokens, types, merges, notes)


def _tokenizer_refused(given: str, expected: str) -> ExportError:
    return ExportError(f"a tokenizer {given}", expected, _REMEDY)


def _split_name(pre: dict[str, Any] | None) -> str:
    """llama.cpp's name for a `pre_tokenizer`."""
    steps = list(pre.get("pretokenizers") or ()) if pre and pre.get("type") == "Sequence" else [pre or {}]
    last = steps[-1] if steps else {}
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if len(steps) == 1 and last.get("use_regex", True):
            return "gpt-2"
        if len(steps) == 2 and not last.get("use_regex", True):
            split = steps[0]
            isolated = split.get("behavior") == "Isolated" and not split.get("invert")
            if split.get("type") == "Split" and isolated:
                name = _SPLITS.get((split.get("pattern") or {}).get("Regex", ""))
                if name is not None:
                    return name
    kinds = ", ".join(str(step.get("type")) for step in steps)
    raise _tokenizer_refused(
        f"that splits text by {kinds} in a way of its own", "the split of GPT-2, Llama 3 or Qwen 2"
    )


def _add_tokenizer(writer: Any, model: StoredModel) -> list[str]:
    checkpoint = model.checkpoint
    path = checkpoint.directory / "tokenizer.json"
    tokenizer = checkpoint.tokenizer()
    if not path.is_file():
        raise _tokenizer_refused("without tokenizer.json", "byte-level BPE")
    vocabulary = read_vocabulary(read_json(path), model.anatomy.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    for kind in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{kind}_token_id")
        if index is not None:
            getattr(writer, f"add_{kind}_token_id")(index)
    with_specials, plain = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    begins = with_specials[: len(with_specials) - len(plain)] if plain else []
    adds_bos = (
        bool(begins) and with_specials[0] == tokenizer.bos_token_id and with_specials[0] not in plain[:1]
    )
    adds_eos = len(with_specials) > len(plain) and with_specials[-1] == tokenizer.eos_token_id
    if len(with_specials) - len(plain) != adds_bos + adds_eos:
        raise _tokenizer_refused("that adds special tokens of its own to a text", "begin and end at most")
    writer.add_add_bos_token(adds_bos)
    writer.add_add_eos_token(adds_eos)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        writer.add_chat_template([{"name": n, "template": t} for n, t in sorted(template.items())])
    elif template:
        writer.add_chat_template(template)
    return vocabulary.notes


# --- model ---------------------------------------------------------------------------------------


def _add_hyperparameters(writer: Any, model: StoredModel) -> None:
    from gguf import RopeScalingType

    config = model.checkpoint.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = _rope(config)
    writer.add_name(model.checkpoint.directory.name)
    writer.add_vocab_size(model.anatomy.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _rope_factors(model: StoredModel) -> Tensor | None:
    """What each rotary frequency is divided by, float32 `[head_dim / 2]`; None where nothing is."""
    config = model.checkpoint.config
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = 2 * len(scaled)
    plain = 1.0 / float(rope["rope_theta"]) ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    return plain / scaled


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    matrix: Matrix | None = None
    stored: str | None = None
    heads: int | None = None
    value: Tensor | None = None

    def packed(self, model: StoredModel) -> PackedWeight:
        """The matrix, its rows in the order of the file."""
        assert self.matrix is not None
        weight = model.packed(self.matrix)
        return weight if self.heads is None else blocks.interleave_weight(weight, self.heads)

    def vector(self, model: StoredModel) -> Tensor:
        """The tensor that is no matrix, float32."""
        if self.value is not None:
            return self.value
        assert self.stored is not None
        value = model.checkpoint.weights.read(self.stored, torch.float32)
        return value if self.heads is None else blocks.interleave_rotary(value, self.heads)

    def data(self, model: StoredModel) -> Tensor:
        """The bytes, `[rows, bytes]`, or float32 values."""
        return self.vector(model) if self.matrix is None else blocks.blocks(self.packed(model))


def _entries(model: StoredModel) -> list[_Entry]:
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    config = model.checkpoint.config
    name = ARCHITECTURES[config.model_type]
    architecture = next(arch for arch in MODEL_ARCH if MODEL_ARCH_NAMES.get(arch) == name)
    names = get_tensor_name_map(architecture, config.num_hidden_layers)

    def translate(stored: str) -> str:
        found = names.get_name(stored, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ExportError(f"tensor `{stored}`", f"tensors that GGUF names for `{name}`", _REMEDY)
        return found

    def heads(stored: str) -> int | None:
        if name not in _INTERLEAVED:
            return None
        role = stored.split(".")[-2]
        return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(role)

    entries = []
    for matrix in model.matrices:
        reason = blocks.refusal(matrix.coding, matrix.in_features, matrix.order, matrix.named_part)
        if reason is not None:
            raise ExportError(
                f"{matrix.label}: {reason}",
                "symmetric integers with float16 scales and groups of whole blocks of 32",
                "plan it anew with `fit --target gguf`, or export to `dense`",
            )
        stored = f"{matrix.name}.weight"
        kind = blocks.gguf_type(matrix.coding)
        size = (matrix.out_features, matrix.in_features)
        entries.append(_Entry(translate(stored), kind, size, matrix=matrix, heads=heads(stored)))
    for stored in model.others:
        shape = model.checkpoint.weights.info(stored).shape
        if len(shape) != 1:
            raise ExportError(
                f"tensor `{stored}` {list(shape)}", "norms and biases beside the linears", _REMEDY
            )
        entries.append(_Entry(translate(stored), "F32", shape, stored=stored, heads=heads(stored)))
    factors = _rope_factors(model)
    if factors is not None:
        entries.append(_Entry("rope_freqs.weight", "F32", tuple(factors.shape), value=factors))
    return entries


def write(model: StoredModel, path: Path) -> list[str]:
    """Write the file; one tensor is in memory at a time.

    Parameters
    ----------
    model : StoredModel
    path : Path

    Returns
    -------
    list of str
        What the user should know.

    Raises
    ------
    ExportError
        Architecture, tokenizer or a coding has no exact counterpart; names it.
    """
    import numpy as np
    from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType

    check_architecture(model.checkpoint.config)
    entries = _entries(model)
    writer = GGUFWriter(path, ARCHITECTURES[model.checkpoint.config.model_type])
    try:
        _add_hyperparameters(writer, model)
        notes = _add_tokenizer(writer, model)
        sizes: Counter[str] = Counter()
        for entry in entries:
            sizes[entry.type] += math.prod(entry.shape)
            kind = GGMLQuantizationType[entry.type]
            if entry.matrix is None:
                nbytes = 4 * math.prod(entry.shape)
                writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
            else:
                nbytes = blocks.gguf_bytes(entry.matrix.coding, *entry.shape)
                shape = (entry.shape[0], nbytes // entry.shape[0])
                writer.add_tensor_info(entry.name, shape, np.dtype(np.uint8), nbytes, raw_dtype=kind)
        main = sizes.most_common(1)[0][0]
        writer.add_file_type(int(LlamaFileType["ALL_F32" if main == "F32" else f"MOSTLY_{main}"]))
        writer.add_quantization_version(GGML_QUANT_VERSION)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(entry.data(model).contiguous().numpy())
    finally:
        writer.close()
    wider = Counter(
        f"{m.coding.bits}-bit weights are stored as {blocks.gguf_type(m.coding)}"
        for m in model.matrices
        if isinstance(m.coding, IntegerCoding) and m.coding.bits not in (4, 5, 8)
    )
    return notes + [f"{count} × {what}" for what, count in sorted(wider.items())]


def verify(model: StoredModel, path: Path) -> None:
    """Read the file with the `gguf` package and compare every tensor with the packed one, value by value.

    Raises
    ------
    ExportError
        A tensor is absent or differs; names it.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    found = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    entries = _entries(model)
    for entry in entries:
        tensor = found.get(entry.name)
        expected = entry.vector(model) if entry.matrix is None else entry.packed(model).dequantize()
        if tensor is None:
            equal = False
        else:
            values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            equal = torch.equal(values.reshape(expected.shape), expected)
        if not equal:
            raise ExportError(
                f"tensor `{entry.name}` isn't the same in the file", "equal values", "please report this"
            )
    if len(found) != len(entries):
        raise ExportError(f"{len(found)} tensors in the file", f"{len(entries)}", "please report this")
