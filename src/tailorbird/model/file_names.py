"""Which files a checkpoint consists of, by their names."""

from __future__ import annotations

from fnmatch import fnmatchcase

from tailorbird.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

#: one of these, or all of a tuple, makes a tokenizer
TOKENIZER_FILES: tuple[tuple[str, ...], ...] = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("spiece.model",),
    ("sentencepiece.bpe.model",),
    ("tekken.json",),
)
#: what a result takes over from its source, byte for byte; never weights, never code
COMPANIONS = (
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


def is_companion(name: str) -> bool:
    """Whether a result takes over the file of this name (relative, with `/`) from its source."""
    return not name.endswith(_NEVER_COPIED) and any(fnmatchcase(name, pattern) for pattern in COMPANIONS)


def refuse_pickles(where: str, names: list[str]) -> None:
    """Where safetensors under their usual names are missing, say what to do with what there is.

    Parameters
    ----------
    where : str
        What to call the place in the message.
    names : list of str
        All files there.

    Raises
    ------
    CheckpointError
        There are only pickles, or safetensors under other names.
    """
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
