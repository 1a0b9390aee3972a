"""Writes a compressed model in the format of another tool, and opens it there to compare.

`dense` is the plain 16-bit checkpoint of the dequantized weights, `compressed-tensors` the packed
integers in that tool's layout, `gguf` the blocks of llama.cpp. What a format can't hold exactly is
refused by name. The result is then opened by transformers in a fresh process in which tailorbird
isn't imported, and must give the distribution of the packed model.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailorbird.calibrate.job import check_output, missing_parents, remove_empty
from tailorbird.compress import gguf_file
from tailorbird.compress.stored_model import Matrix, StoredModel
from tailorbird.errors import ExportError, ResourceError, SettingsError, nearest
from tailorbird.evaluate.quality import Divergence
from tailorbird.formats import compressed_tensors
from tailorbird.formats.packed import SCALE_DTYPES, FloatCoding, IntegerCoding, stored_bytes
from tailorbird.model.checkpoint import Checkpoint, write_json, write_tensors
from tailorbird.model.json_file import read_json
from tailorbird.model.load import load
from tailorbird.model.weights import INDEX_FILE, SINGLE_FILE, Weights

FORMATS = ("dense", "compressed-tensors", "gguf")
#: mean KL to the packed model above which an export is refused, nats per token
MAX_KL = 1e-3
#: what is compared: sequences that the packed model writes itself
SEQUENCES, TOKENS = 4, 64
#: bytes of one safetensors file
SHARD = 1 << 30
#: lies in an unfinished export, so that it can be told from unfinished work of another kind
MARK = ".tailorbird-export"


@dataclass(frozen=True)
class ExportResult:
    """What `export` made.

    Attributes
    ----------
    format, output : str
    kl_mean : float
        KL(packed ‖ exported) over text that the packed model wrote, nats per token, both in float32.
    max_logit_difference : float
        Largest over all positions and tokens.
    bytes_before, bytes_after : int
        Of the tensors, headers not counted; of a GGUF file everything.
    notes : tuple of str
        What the user should know.
    """

    format: str
    output: str
    kl_mean: float
    max_logit_difference: float
    bytes_before: int
    bytes_after: int
    notes: tuple[str, ...]


def export(directory: Path, to: str, output: Path) -> ExportResult:
    """Export a compressed checkpoint.

    Parameters
    ----------
    directory : Path
        Of a model that tailorbird made.
    to : str
        ``dense``, ``compressed-tensors`` or ``gguf``.
    output : Path
        A directory to be made; with ``gguf`` a file.

    Raises
    ------
    SettingsError
        The format is unknown or `output` exists.
    ExportError
        The format can't hold the model, its package is missing, or the exported model differs.
    UserError
        The checkpoint is damaged.
    """
    if to not in FORMATS:
        raise SettingsError(f"format `{to}`", "a format to export to", nearest(to, FORMATS))
    check_output(output)
    _require_packages(to)
    model = StoredModel.open(directory)
    for name, module in model.layout.modules.items():
        if module.simulated is not None:
            raise ExportError(
                f"`{name}`, whose inputs are rounded to {module.simulated}",
                "inputs as they are, which is what other tools multiply",
                f"compress the model anew without activation={module.simulated}",
            )
    with _unfinished(output, is_file=to == "gguf") as partial:
        notes = _WRITERS[to](model, partial)
        kl, difference = _compare(model.checkpoint, partial, to)
        after = partial.stat().st_size if to == "gguf" else Weights.open(partial).total_bytes
    if not model.checkpoint.weights.recorded_hashes():
        notes.append("the source records no hashes (another program saved it), so its bytes weren't verified")
    before = model.checkpoint.weights.total_bytes
    growth = (after - before) / before
    word = "grew" if growth >= 0 else "shrank"
    notes.append(f"tensors {word} from {before:,} to {after:,} bytes ({growth:+.1%})")
    return ExportResult(to, str(output), kl, difference, before, after, tuple(notes))


def check_gguf_architecture(checkpoint: Checkpoint) -> None:
    """Raise ExportError where llama.cpp has no architecture for the model, by name and reason."""
    gguf_file.check_architecture(checkpoint.config)


def _require_packages(to: str) -> None:
    needed = {"dense": (), "compressed-tensors": ("compressed_tensors",), "gguf": ("gguf", "accelerate")}[to]
    for package in needed:
        if importlib.util.find_spec(package) is None:
            raise ExportError(
                f"the package `{package}` isn't installed",
                f"it, for writing or checking `{to}`",
                "install `tailorbird[bench]`",
            )


@contextmanager
def _unfinished(output: Path, is_file: bool) -> Iterator[Path]:
    """``OUTPUT.partial`` to write into: becomes `output` when all went well, and vanishes when not."""
    partial = output.with_name(output.name + ".partial")
    if partial.is_dir() and (partial / MARK).exists():
        shutil.rmtree(partial)
    elif partial.is_dir():
        raise SettingsError(
            f"{partial} holds unfinished work of another command",
            "no such directory, or one that an export left",
            "finish or remove it, or choose another --output",
        )
    partial.unlink(missing_ok=True)
    parents = missing_parents(output)
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        if not is_file:
            partial.mkdir()
            (partial / MARK).touch()
        yield partial
        if not is_file:
            (partial / MARK).unlink()
        partial.rename(output)
    except OSError as error:
        raise ResourceError(
            f"{output} cannot be written ({error.strerror})",
            "a writable directory with enough space",
            "free some space or choose another --output",
        ) from error
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
        remove_empty(parents)


# --- safetensors ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """Tensors that are made and written together.

    Attributes
    ----------
    name : str
        Of the module or tensor, by which pieces are ordered.
    nbytes : int
        About what they take.
    make : function without arguments
        Returns them by name.
    """

    name: str
    nbytes: int
    make: Callable[[], dict[str, Tensor]]


def _write_dense(model: StoredModel, partial: Path) -> list[str]:
    dtype = model.float_dtype
    pieces = [_dense_piece(model, matrix, dtype) for matrix in model.matrices]
    pieces += [_other_piece(model, name, dtype) for name in model.others]
    _write_pieces(partial, pieces)
    _write_config(model, partial, dtype, None)
    return []


def _write_compressed_tensors(model: StoredModel, partial: Path) -> list[str]:
    packed: list[Matrix] = []
    dense: list[Matrix] = []
    notes: list[str] = []
    for matrix in model.matrices:
        reason = compressed_tensors.refusal(
            matrix.coding, matrix.in_features, matrix.order, matrix.named_part
        )
        if isinstance(matrix.coding, FloatCoding):
            dense.append(matrix)
        elif matrix.kind == "embedding" or (matrix.kind == "head" and reason is not None):
            why = reason or "transformers can't load packed embeddings"
            notes.append(f"{matrix.label} is stored in 16 bits: {why}")
            dense.append(matrix)
        elif matrix.kind == "conv1d":
            raise ExportError(
                f"{matrix.label} is a Conv1D",
                "linears, which are all that compressed-tensors packs",
                "export to `dense` instead",
            )
        elif reason is not None:
            raise ExportError(
                f"{matrix.label}: {reason}",
                "integers in the inputs' order, with nothing beside them",
                "export to `dense` instead",
            )
        else:
            packed.append(matrix)
    scales = {SCALE_DTYPES[m.coding.scale_dtype] for m in packed if isinstance(m.coding, IntegerCoding)}
    # Scales are cast to the model's dtype when they are loaded; it must hold them.
    dtype = scales.pop() if len(scales) == 1 else torch.float32 if scales else model.float_dtype
    if dtype != model.float_dtype:
        notes.append(
            f"the model loads as {str(dtype).removeprefix('torch.')}, which holds all scales exactly"
        )
    pieces = [_dense_piece(model, matrix, model.float_dtype) for matrix in dense]
    pieces += [_packed_piece(model, matrix) for matrix in packed]
    schemes = {
        matrix.name: compressed_tensors.scheme(matrix.coding, matrix.in_features)
        for matrix in packed
        if isinstance(matrix.coding, IntegerCoding)
    }
    in_blocks = sum(scheme["strategy"] == "block" for scheme in schemes.values())
    if in_blocks:
        notes.append(
            f"{in_blocks} linears with zero points or a short last group are stored in blocks of one row; "
            "compressed-tensors and transformers read them, serving engines may not"
        )
    pieces += [_other_piece(model, name, model.float_dtype) for name in model.others]
    _write_pieces(partial, pieces)
    ignored = [m.name for m in dense if m.kind != "embedding"]
    if model.anatomy.tied:
        ignored.append(model.anatomy.head)
    quantization = compressed_tensors.quantization_config(schemes, ignored, version("compressed-tensors"))
    _write_config(model, partial, dtype, quantization)
    return notes


def _dense_piece(model: StoredModel, matrix: Matrix, dtype: torch.dtype) -> Piece:
    nbytes = matrix.out_features * matrix.in_features * dtype.itemsize
    return Piece(matrix.name, nbytes, lambda: {f"{matrix.name}.weight": model.dense(matrix, dtype)})


def _packed_piece(model: StoredModel, matrix: Matrix) -> Piece:
    def make() -> dict[str, Tensor]:
        tensors = compressed_tensors.convert(model.packed(matrix))
        return {f"{matrix.name}.{part}": tensor for part, tensor in tensors.items()}

    return Piece(matrix.name, stored_bytes(matrix.coding, matrix.out_features, matrix.in_features), make)


def _other_piece(model: StoredModel, name: str, dtype: torch.dtype) -> Piece:
    """A norm or bias as it is stored; a table, such as of positions, in `dtype`."""
    weights = model.checkpoint.weights
    info = weights.info(name)
    target = dtype if info.dtype.is_floating_point and len(info.shape) > 1 else info.dtype
    return Piece(name, info.nbytes, lambda: {name: weights.read(name, target)})


def _write_pieces(partial: Path, pieces: list[Piece]) -> None:
    """Write safetensors of about `SHARD` bytes, or of one piece, holding one file in memory at a time."""
    shards: list[list[Piece]] = [[]]
    for piece in sorted(pieces, key=lambda piece: piece.name):
        if shards[-1] and sum(p.nbytes for p in shards[-1]) + piece.nbytes > SHARD:
            shards.append([])
        shards[-1].append(piece)
    places: dict[str, str] = {}
    total = 0
    for i, shard in enumerate(shards):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for piece in shard:
            tensors |= piece.make()
        write_tensors(partial / file, tensors, hashes=False)
        places |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(partial / INDEX_FILE, index)


def _write_config(
    model: StoredModel, partial: Path, dtype: torch.dtype, quantization: dict[str, Any] | None
) -> None:
    config = read_json(model.checkpoint.directory / "config.json")
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    config.pop("quantization_config")
    if quantization is not None:
        config["quantization_config"] = quantization
    write_json(partial / "config.json", config)
    model.checkpoint.copy_companions(partial)


def _write_gguf(model: StoredModel, partial: Path) -> list[str]:
    notes = gguf_file.write(model, partial)
    gguf_file.verify(model, partial)
    return notes


_WRITERS: dict[str, Callable[[StoredModel, Path], list[str]]] = {
    "dense": _write_dense,
    "compressed-tensors": _write_compressed_tensors,
    "gguf": _write_gguf,
}

# --- comparison ----------------------------------------------------------------------------------

_REOPEN = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

folder, file, ids, out = sys.argv[1:]
where = {"gguf_file": file, "config": AutoConfig.from_pretrained(folder)} if file else {}
model, info = AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, local_files_only=True, output_loading_info=True, **where
)
wrong = sorted(map(str, [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]))
if wrong:
    sys.exit("missing, unexpected or of another shape: " + ", ".join(wrong[:5]))
if any(name.partition(".")[0] == "tailorbird" for name in sys.modules):
    sys.exit("tailorbird was imported")
with torch.no_grad():
    save_file({"logits": model(load_file(ids)["ids"]).logits.float().contiguous()}, out)
"""


def _compare(checkpoint: Checkpoint, exported: Path, to: str) -> tuple[float, float]:
    """Mean KL in nats per token and largest logit difference of the exported to the packed model."""
    ids, logits = _own_text(checkpoint)
    with tempfile.TemporaryDirectory(prefix="tailorbird-export-") as scratch:
        other = _reopen(checkpoint.directory, exported, to, ids, Path(scratch))
    divergence = Divergence()
    divergence.add(logits, other, ids[:, 1:])
    kl = divergence.finish().kl_mean
    if not kl < MAX_KL:
        raise ExportError(
            f"the exported model differs from the packed one by a KL of {kl:.2e} nats per token",
            f"below {MAX_KL:g}",
            "please report this; the export was removed",
        )
    return kl, float((logits - other).abs().max())


@torch.no_grad()
def _own_text(checkpoint: Checkpoint) -> tuple[Tensor, Tensor]:
    """Token ids `[sequences, tokens]` that the packed model samples, and its logits for them."""
    model = load(checkpoint.directory, dtype=torch.float32)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    length = min(TOKENS, getattr(model.config, "max_position_embeddings", None) or TOKENS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ids = torch.randint(vocabulary, (SEQUENCES, 1))
        cache = None
        for _ in range(length - 1):
            step = model(ids if cache is None else ids[:, -1:], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            chosen = torch.multinomial(torch.softmax(step.logits[:, -1], -1), 1)
            ids = torch.cat([ids, chosen], dim=1)
    return ids, model(ids, use_cache=False).logits


def _reopen(source: Path, exported: Path, to: str, ids: Tensor, scratch: Path) -> Tensor:
    """Logits of the exported model from a process that has transformers alone."""
    write_tensors(scratch / "ids.safetensors", {"ids": ids}, hashes=False)
    folder, file = exported.absolute(), ""
    if to == "gguf":
        # transformers wants a folder and a name that ends in .gguf, and doesn't read all that the file
        # says of the model (Qwen3's head size), so that config.json stands beside it.
        folder, file = scratch, "model.gguf"
        (scratch / file).symlink_to(exported.absolute())
        config = read_json(source / "config.json")
        del config["quantization_config"]
        write_json(scratch / "config.json", config)
    out = scratch / "logits.safetensors"
    run = subprocess.run(
        [sys.executable, "-I", "-c", _REOPEN, str(folder), file, str(scratch / "ids.safetensors"), str(out)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode != 0:
        said = (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1]
        raise ExportError(
            f"transformers can't open the exported model: {said}"[:600],
            f"a model that it loads as `{to}`",
            "please report this; the export was removed",
        )
    from safetensors.torch import load_file

    return load_file(out)["logits"]
