"""What `config.json` may say: checked as plain data before any library believes it.

Nothing that a file names is fetched, imported or run, and no size is believed that would make a
library build endless lists. Whether the sizes fit the tensors is the anatomy's business.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tailorbird.errors import CheckpointError, nearest
from tailorbird.model.weights import Weights

#: `quantization_config.quant_method` of our own checkpoints
QUANT_METHOD = "tailorbird"

#: offered where a model_type is unknown
_FAMILIES = (
    *("falcon", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "llama", "mistral"),
    *("olmo", "olmo2", "opt", "phi3", "qwen2", "qwen3", "stablelm"),
)

#: fields that must be whole numbers within these bounds, where a config has them (None is as absent)
_SIZES: dict[str, tuple[int, int]] = {
    "vocab_size": (2, 1 << 24),
    "hidden_size": (1, 1 << 20),
    "n_embd": (1, 1 << 20),
    "d_model": (1, 1 << 20),
    "word_embed_proj_dim": (1, 1 << 20),
    "intermediate_size": (1, 1 << 22),
    "ffn_hidden_size": (1, 1 << 22),
    "ffn_dim": (1, 1 << 22),
    "n_inner": (1, 1 << 22),
    "head_dim": (1, 1 << 16),
    "num_hidden_layers": (1, 4096),
    "n_layer": (1, 4096),
    "n_layers": (1, 4096),
    "num_layers": (1, 4096),
    "num_attention_heads": (1, 1 << 16),
    "n_head": (1, 1 << 16),
    "n_heads": (1, 1 << 16),
    "num_key_value_heads": (1, 1 << 16),
    "num_kv_heads": (1, 1 << 16),
    "max_position_embeddings": (1, 1 << 30),
    "n_positions": (1, 1 << 30),
    "sliding_window": (0, 1 << 30),
    "num_labels": (0, 1 << 16),
}
_LARGEST_INTEGER = 1 << 40
_DTYPES = {"float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2", "auto"}
#: fields by which a config file would make a loader fetch code or read other files than these
_REDIRECTIONS = ("configuration_files", "transformers_weights", "gguf_file", "custom_generate")
_IMPLEMENTATIONS = (
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
)


def check_config(path: Path, raw: dict[str, Any]) -> None:
    """Refuse a config that is unsafe, absurd or not of a causal language model.

    Parameters
    ----------
    path : Path
        Of config.json, for the messages.
    raw : dict
        Its content.

    Raises
    ------
    CheckpointError
        Names the field.
    """
    refuse_code(path, raw)
    is_compressed(path, raw)
    _check_sizes(path, raw)
    _check_kind(path, raw)


def refuse_code(path: Path, value: dict[str, Any]) -> None:
    """Refuse every field by which a JSON file could make a loader run code or read other files.

    Raises
    ------
    CheckpointError
        Names the field and what it would run.
    """
    for name, item in _fields(value):
        if name == "auto_map":
            what = ", ".join(map(str, item.values())) if isinstance(item, dict) else str(item)
            raise CheckpointError(
                f"{path}: `auto_map` asks to run the model's own code ({what[:200]})",
                "a model whose code is part of transformers; code from a checkpoint is never executed",
                "use the version of the model that transformers supports natively, or remove `auto_map` "
                "if its model_type is one",
            )
        if name in _REDIRECTIONS:
            raise CheckpointError(
                f"{path}: `{name}` points to other files",
                "one config.json and weights under their usual names",
                f"remove `{name}` after checking what it is for",
            )
        if name in _IMPLEMENTATIONS and isinstance(item, str) and not re.fullmatch(r"\w+", item):
            raise CheckpointError(
                f"{path}: `{name}` is {item[:200]!r}, code that would be fetched and run",
                "an implementation that is part of transformers",
                f"remove `{name}`",
            )


def _fields(value: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """All (key, value) pairs of nested objects."""
    pending: list[Any] = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            yield from item.items()
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)


def is_compressed(path: Path, raw: dict[str, Any]) -> bool:
    """Whether tailorbird wrote the packed weights; a model quantized by another tool is a CheckpointError."""
    quantization = raw.get("quantization_config")
    if quantization is None:
        if raw.get("compression_config") is not None:
            quantization = {"quant_method": "compressed-tensors"}
        else:
            return False
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method == QUANT_METHOD:
        return True
    raise CheckpointError(
        f"{path}: the model was already quantized by {method!r}"[:300],
        "a model in 16 or 32 bits, or one that tailorbird compressed",
        "give the original model",
    )


def _check_sizes(path: Path, raw: dict[str, Any]) -> None:
    """Refuse sizes that no model has, before any library makes lists of that length."""

    def refuse(name: str, item: object, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{path}: `{name[:80]}` is {item!r}"[:300], expected, "take config.json from the original model"
        )

    for name, item in _fields(raw):
        if name in _SIZES and item is not None and not isinstance(item, list | dict):
            low, high = _SIZES[name]
            if type(item) is not int or not low <= item <= high:
                raise refuse(name, item, f"a whole number from {low} to {high}")
        elif type(item) is int and abs(item) > _LARGEST_INTEGER:
            raise refuse(name, "a number of " + str(item.bit_length()) + " bits", "a plausible number")
        elif isinstance(item, float) and math.isnan(item):
            raise refuse(name, item, "a number")
        elif name in ("dtype", "torch_dtype") and item is not None:
            if not isinstance(item, str) or item.removeprefix("torch.") not in _DTYPES:
                raise refuse(name, item, "one of " + ", ".join(sorted(_DTYPES)))
        elif name.startswith("__"):
            raise refuse(name, item, "the name of a setting")


def _check_kind(path: Path, raw: dict[str, Any]) -> None:
    """Refuse what transformers doesn't know as a causal language model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING_NAMES:
        raise CheckpointError(
            f"{path}: model_type {kind!r}"[:300] if "model_type" in raw else f"{path}: has no model_type",
            "an architecture that the installed transformers knows",
            nearest(str(kind)[:80], _FAMILIES),
        )
    remedy = "give a causal (decoder-only) language model"
    if raw.get("is_encoder_decoder"):
        raise CheckpointError(f"{path}: `{kind}` is an encoder-decoder model", "a decoder-only one", remedy)
    classes = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    if classes is None:
        raise CheckpointError(f"{path}: `{kind}` is not a causal language model", "one", remedy)
    known = {classes} if isinstance(classes, str) else set(classes)
    stated = raw.get("architectures")
    if stated is not None and (not isinstance(stated, list) or not all(isinstance(a, str) for a in stated)):
        raise CheckpointError(f"{path}: `architectures` is {stated!r}"[:300], "a list of class names", remedy)
    if stated and not known & set(stated):
        raise CheckpointError(
            f"{path}: the checkpoint holds a {', '.join(stated)}"[:300],
            " or ".join(sorted(known)),
            "give the checkpoint of the causal language model",
        )


@contextmanager
def typed(directory: Path, what: str, remedy: str) -> Iterator[None]:
    """Turn whatever a library throws at a damaged file into a CheckpointError.

    Tokenizers panic through a BaseException of their own, so only the interpreter's pass.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, CheckpointError):
        raise
    except BaseException as error:
        said = " ".join(str(error).split())[:400]
        raise CheckpointError(
            f"{directory}: {what} cannot be made ({type(error).__name__}: {said})",
            "files that the installed transformers understands",
            remedy,
        ) from error


def make_config(directory: Path, raw: dict[str, Any], weights: Weights) -> Any:
    """Let transformers read a config that `check_config` found sound.

    Parameters
    ----------
    directory : Path
        Of the checkpoint.
    raw : dict
        Content of its config.json.
    weights : Weights
        A model with more blocks than tensors is refused before anybody makes as many modules.

    Returns
    -------
    transformers.PreTrainedConfig

    Raises
    ------
    CheckpointError
        transformers doesn't accept it, or a size that every model has is missing or absurd.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    path = directory / "config.json"
    remedy = "take config.json from the original model, or install a newer transformers"
    with typed(directory, "the model's config", remedy):
        methods = sorted(n for n in raw if callable(getattr(CONFIG_MAPPING[raw["model_type"]], n, None)))
        if methods:
            raise CheckpointError(f"{path}: `{methods[0][:80]}` is not a setting", "settings only", remedy)
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        text = config.get_text_config()
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            value = getattr(text, name, None)
            low, high = _SIZES[name]
            if type(value) is not int or not low <= value <= high:
                expected = f"a whole number from {low} to {high}"
                raise CheckpointError(f"{path}: `{name}` is {value!r}"[:300], expected, remedy)
        if text.num_hidden_layers > len(weights.names):
            raise CheckpointError(
                f"{path}: `num_hidden_layers` is {text.num_hidden_layers}",
                f"fewer blocks than the {len(weights.names)} tensors of the weights",
                remedy,
            )
    return config
