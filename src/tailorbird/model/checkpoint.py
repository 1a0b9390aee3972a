"""A model as it lies on the disk: found, checked and opened, with nothing executed.

`open_checkpoint` reads `config.json` and the safetensors headers, and refuses what is damaged,
unsafe or not a causal language model before any weight is read. How the tensors fit together is the
anatomy's business; the writing functions are offered here too, so that a checkpoint is read and
written through one module.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tailorbird.errors import CheckpointError, ModelNotFound, ResourceError, SettingsError, nearest
from tailorbird.model.json_file import read_json
from tailorbird.model.weights import INDEX_FILE, SINGLE_FILE, Weights
from tailorbird.model.writing import tensor_hash, write_json, write_tensors, write_text

__all__ = [
    "DEMO",
    "Checkpoint",
    "demo_text",
    "locate",
    "open_checkpoint",
    "tensor_hash",
    "write_json",
    "write_tensors",
    "write_text",
]

#: the name of the model that ships in the package
DEMO = "demo"
_DEMO_DIRECTORY = Path(__file__).parent / "demo"

#: `quantization_config.quant_method` of our own checkpoints
QUANT_METHOD = "tailorbird"

#: how long to wait for the Hub's first answer
_HUB_SECONDS = 8
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

#: one of these, or all of a tuple, makes a tokenizer
_TOKENIZER_FILES: tuple[tuple[str, ...], ...] = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("spiece.model",),
    ("sentencepiece.bpe.model",),
    ("tekken.json",),
)
#: what a result takes over from its source, byte for byte; never weights, never code
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v*",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "spiece.model",
    "sentencepiece*.model",
    "*.spm",
    "*.tiktoken",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "COPYING*",
)
_NEVER_COPIED = (".py", ".pyc", ".so", ".sh", ".safetensors")

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


def locate(model: str) -> Path:
    """Find the directory of a model.

    Parameters
    ----------
    model : str
        `demo`, a local directory, or a Hugging Face id (`org/name`), of which only safetensors,
        JSON and tokenizer files are fetched.

    Returns
    -------
    Path

    Raises
    ------
    ModelNotFound
        The path leads nowhere, to a file, or the Hub cannot be reached or doesn't have the model.
    """
    if model == DEMO:
        return _DEMO_DIRECTORY
    path = Path(model).expanduser()
    try:
        if path.is_dir():
            return path
        exists = path.exists()
    except (OSError, ValueError):  # too long for a path, or holds a NUL
        exists = False
    if exists:
        raise ModelNotFound(
            f"{model} is a file",
            "the directory of a model, with config.json and safetensors",
            f"give its directory, `{path.parent}`",
        )
    if _HUB_ID.fullmatch(model) is None or ".." in model:
        raise ModelNotFound(
            f"there is no directory {model!r}"[:300],
            "a local directory, a Hugging Face id such as `org/name`, or `demo`",
            "check the path",
        )
    return _fetch(model)


def _fetch(model: str) -> Path:
    """The snapshot of a model on the Hub, from the cache where there is no network."""
    import huggingface_hub
    from huggingface_hub import errors

    def refuse(given: str, remedy: str) -> ModelNotFound:
        return ModelNotFound(given, "a local directory, the id of a model on the Hugging Face Hub", remedy)

    here = f"there is no directory `{model}`, and "
    patterns = ["model*.safetensors", INDEX_FILE, "config.json", "README.md", *_COMPANIONS]
    revision = unreachable = None
    try:
        # Asked first because this call alone takes a limit on its time.
        info = huggingface_hub.HfApi().model_info(model, timeout=_HUB_SECONDS)
    except errors.GatedRepoError:
        raise refuse(
            f"{here}the model of this id is gated", "accept its terms on its page, then `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise refuse(
            f"{here}no model of this id on the Hub that you may read",
            "check the spelling; for a private model `hf auth login`",
        ) from None
    except Exception as error:  # what a broken network raises differs between versions of the library
        unreachable = " ".join(str(error).split())[:200] or type(error).__name__
    else:
        revision = info.sha
        patterns = _wanted_files(model, [file.rfilename for file in info.siblings or []])
    try:
        return Path(
            huggingface_hub.snapshot_download(
                model, revision=revision, allow_patterns=patterns, local_files_only=unreachable is not None
            )
        )
    except Exception as error:
        if unreachable is not None:
            raise refuse(
                f"{here}the Hub cannot be reached ({unreachable})",
                "fetch it where there is a network (`hf download`) and give the directory, or try `demo`",
            ) from error
        said = " ".join(str(error).split())[:300]
        raise refuse(
            f"`{model}` could not be fetched from the Hub ({type(error).__name__}: {said})",
            "try again, or give a local directory",
        ) from error


def _wanted_files(model: str, names: list[str]) -> list[str]:
    """Of the files of a repository those that a checkpoint consists of."""
    if SINGLE_FILE in names:
        weights = [SINGLE_FILE]
    elif INDEX_FILE in names:
        weights = [INDEX_FILE] + [n for n in names if fnmatchcase(n, "*.safetensors") and "/" not in n]
    else:
        _refuse_pickles(f"the model `{model}` on the Hub", names)
        weights = []
    return weights + [
        name
        for name in names
        if name in ("config.json", "README.md") or any(fnmatchcase(name, pattern) for pattern in _COMPANIONS)
    ]


def demo_text(part: str) -> Path:
    """Text that ships with the demo model.

    Parameters
    ----------
    part : str
        `calibration` or `held_out`.

    Returns
    -------
    Path
        A jsonl file with `text` per line.

    Raises
    ------
    SettingsError
        Any other `part`.
    """
    if part not in ("calibration", "held_out"):
        raise SettingsError(
            f"demo text {part!r}", "`calibration` or `held_out`", nearest(part, ["calibration", "held_out"])
        )
    return _DEMO_DIRECTORY / f"{part}.jsonl"


@dataclass
class Checkpoint:
    """A checkpoint directory whose config and headers were read and found sound.

    Attributes
    ----------
    directory : Path
    config : transformers.PreTrainedConfig
    weights : Weights
    compressed : bool
        Written by tailorbird, with packed weights.
    fingerprint : str
        SHA-256 over config.json, all headers, and names, sizes and times of the weight files, hex:
        changes whenever they do, and is found without reading a weight.
    parameters : int
        Number of floating-point values, a packed weight counted unpacked.
    """

    directory: Path
    config: Any
    weights: Weights
    compressed: bool
    fingerprint: str
    parameters: int

    def tokenizer(self) -> Any:
        """Load the tokenizer from the directory's own files.

        Returns
        -------
        transformers.PreTrainedTokenizerBase

        Raises
        ------
        CheckpointError
            Its files are missing, damaged, name code to be run, or belong to a larger vocabulary.
        """
        found = any(all((self.directory / f).is_file() for f in files) for files in _TOKENIZER_FILES)
        if not found and not any(self.directory.glob("*.tiktoken")):
            raise CheckpointError(
                f"{self.directory} has no tokenizer",
                "tokenizer.json, tokenizer.model, or vocab.json with merges.txt",
                "copy the tokenizer's files from the original model into the directory",
            )
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (self.directory / name).exists():
                _refuse_code(self.directory / name, read_json(self.directory / name))
        from transformers import AutoTokenizer

        remedy = "copy the tokenizer's files anew from the original model"
        with _typed(self.directory, "the tokenizer", remedy):
            tokenizer = AutoTokenizer.from_pretrained(
                self.directory, local_files_only=True, trust_remote_code=False
            )
            size = int(tokenizer.vocab_size)
        embedded = self.config.get_text_config().vocab_size
        if size > embedded:
            raise CheckpointError(
                f"{self.directory}: the tokenizer has {size} tokens",
                f"at most {embedded}, the model's vocab_size",
                remedy,
            )
        return tokenizer

    @property
    def licence(self) -> str | None:
        """The licence that the model card states, else the first line of the licence file, else None."""
        card = self.directory / "README.md"
        if card.is_file():
            front = re.match(r"---\s*\n(.*?)\n---", _beginning(card), re.DOTALL)
            if front:
                fields = dict(
                    re.findall(r"^(license(?:_name)?):[ \t]*\n?[ \t]*-?[ \t]*(\S.*?)[ \t]*$", front[1], re.M)
                )
                stated = fields.get("license_name") or fields.get("license")
                if stated:
                    return stated.strip("\"'[] ")
        for path in sorted(p for p in self.directory.iterdir() if p.name.startswith(("LICENSE", "LICENCE"))):
            for line in _beginning(path).splitlines():
                if line.strip():
                    return line.strip()[:200]
        return None

    def content_hash(self) -> str:
        """SHA-256 over name, dtype, shape and bytes of every tensor in the order of names, hex.

        Reads all weights; independent of how they are spread over shards.
        """
        digest = hashlib.sha256()
        for name in self.weights.names:
            info = self.weights.info(name)
            digest.update(f"{name}\0{info.dtype}\0{list(info.shape)}\0".encode())
            digest.update(bytes.fromhex(self.weights.hash(name)))
        return digest.hexdigest()

    def copy_companions(self, target: Path) -> list[str]:
        """Copy tokenizer, generation config, chat templates and licences, byte for byte.

        Parameters
        ----------
        target : Path
            An existing directory.

        Returns
        -------
        list of str
            The names copied, relative to the directory, sorted.

        Raises
        ------
        ResourceError
            The disk is full or the target may not be written.
        """
        copied = []
        folders = [self.directory, self.directory / "additional_chat_templates"]
        files = [path for folder in folders if folder.is_dir() for path in folder.iterdir() if path.is_file()]
        for path in sorted(files):
            name = path.relative_to(self.directory).as_posix()
            if path.suffix in _NEVER_COPIED or not any(fnmatchcase(name, p) for p in _COMPANIONS):
                continue
            try:
                (target / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target / name)
            except OSError as error:
                raise ResourceError(
                    f"{name} cannot be copied to {target} ({error.strerror})",
                    "a writable directory with enough space",
                    "free some space or choose another directory",
                ) from error
            copied.append(name)
        return copied


def open_checkpoint(model: str) -> Checkpoint:
    """Find a model and read its config and headers; no weight is read and no code is run.

    Parameters
    ----------
    model : str
        As in `locate`.

    Raises
    ------
    ModelNotFound
        As in `locate`.
    CheckpointError
        A file is missing or damaged, the model isn't a causal language model, brings code of its
        own, has pickled weights only, or was quantized by another tool.
    """
    directory = locate(model)
    path = directory / "config.json"
    if not path.exists():
        raise CheckpointError(
            f"{directory} has no config.json",
            "a model's directory in Hugging Face layout",
            "give the directory that holds config.json and the safetensors",
        )
    raw = read_json(path)
    _refuse_code(path, raw)
    compressed = _is_compressed(path, raw)
    _check_sizes(path, raw)
    _check_kind(path, raw)
    _refuse_pickles(str(directory), [entry.name for entry in directory.iterdir()])
    weights = Weights.open(directory)
    config = _make_config(directory, raw, weights)
    if (directory / "generation_config.json").exists():
        generation = directory / "generation_config.json"
        _refuse_code(generation, read_json(generation))
    return Checkpoint(
        directory,
        config,
        weights,
        compressed,
        _fingerprint(directory, weights),
        _parameters(path, raw, weights),
    )


def _refuse_code(path: Path, value: dict[str, Any]) -> None:
    """Refuse every field by which a JSON file could make a loader run code or read other files."""
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


def _is_compressed(path: Path, raw: dict[str, Any]) -> bool:
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
            f"{path}: model_type {kind!r}"[:300],
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


def _refuse_pickles(where: str, names: list[str]) -> None:
    """Where safetensors under their usual names are missing, say what to do with what there is."""
    if SINGLE_FILE in names or INDEX_FILE in names:
        return
    pickles = sorted(name for name in names if any(fnmatchcase(name, pattern) for pattern in _PICKLES))
    if pickles:
        raise CheckpointError(
            f"{where} has pickled weights only ({', '.join(pickles[:3])})",
            "safetensors; opening a pickle can run any code, and tailorbird never does",
            "if you trust the file, convert it: "
            "`AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW, safe_serialization=True)`",
        )
    others = sorted(name for name in names if name.endswith(".safetensors"))
    if others:
        raise CheckpointError(
            f"{where} has {', '.join(others[:3])} but neither {SINGLE_FILE} nor {INDEX_FILE}",
            "weights under their usual names",
            f"fetch {INDEX_FILE} too, or rename the file if it holds the whole model",
        )


@contextmanager
def _typed(directory: Path, what: str, remedy: str) -> Iterator[None]:
    """Turn whatever a library throws at a damaged file into a CheckpointError.

    Tokenizers panic through a BaseException of their own, so only the interpreter's pass.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        said = " ".join(str(error).split())[:400]
        raise CheckpointError(
            f"{directory}: {what} cannot be made ({type(error).__name__}: {said})",
            "files that the installed transformers understands",
            remedy,
        ) from error


def _make_config(directory: Path, raw: dict[str, Any], weights: Weights) -> Any:
    from transformers import AutoConfig

    remedy = "take config.json from the original model, or install a newer transformers"
    with _typed(directory, "the model's config", remedy):
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        text = config.get_text_config()
    shadowed = sorted(name for name in raw if callable(getattr(type(config), name, None)))
    if shadowed:
        raise CheckpointError(
            f"{directory / 'config.json'}: `{shadowed[0][:80]}` is not a setting", "settings only", remedy
        )
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        value = getattr(text, name, None)
        low, high = _SIZES[name]
        if type(value) is not int or not low <= value <= high:
            raise CheckpointError(
                f"{directory / 'config.json'}: `{name}` is {value!r}"[:300],
                f"a whole number from {low} to {high}",
                remedy,
            )
    if text.num_hidden_layers > len(weights.names):  # before anybody makes as many modules
        raise CheckpointError(
            f"{directory / 'config.json'}: `num_hidden_layers` is {text.num_hidden_layers}",
            f"fewer blocks than the {len(weights.names)} tensors of the weights",
            remedy,
        )
    return config


def _fingerprint(directory: Path, weights: Weights) -> str:
    digest = hashlib.sha256()
    digest.update((directory / "config.json").read_bytes())
    digest.update(weights.header_digest.encode())
    for file in weights.files:
        status = os.stat(file)
        digest.update(f"{file.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _parameters(path: Path, raw: dict[str, Any], weights: Weights) -> int:
    """Count the floating-point values; of a packed module, those that it had before packing."""
    modules = (raw.get("quantization_config") or {}).get("modules", {})
    packed: set[str] = set()
    count = 0
    for name, module in modules.items() if isinstance(modules, dict) else [("modules", modules)]:
        rows, columns = (module.get("out"), module.get("in")) if isinstance(module, dict) else (None, None)
        if not (isinstance(rows, int) and isinstance(columns, int) and rows > 0 and columns > 0):
            raise CheckpointError(
                f"{path}: `quantization_config` doesn't state `out` and `in` of `{name[:200]}`",
                "a table of modules with their sizes, as tailorbird writes it",
                "take config.json from the original checkpoint",
            )
        if f"{name}.codes" in weights:
            packed |= {f"{name}.{part}" for part in ("codes", "scales", "zeros", "order")}
            count += rows * columns
    for name in weights.names:
        info = weights.info(name)
        if name not in packed and info.dtype.is_floating_point:
            count += math.prod(info.shape)
    return count


def _beginning(path: Path) -> str:
    """The first 64 KiB of a text file; nothing where it can't be read."""
    try:
        with path.open("rb") as file:
            return file.read(1 << 16).decode("utf-8", errors="replace")
    except OSError:
        return ""
