"""Puts many adapters into a basis that they share, or into a few bases: reads, computes, writes."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tailorbird.errors import ResourceError, SettingsError
from tailorbird.formats.peft import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from tailorbird.kernels.adapters import LinearAdapter
from tailorbird.linear.product import Product
from tailorbird.model.anatomy import read_anatomy
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.model.load import load
from tailorbird.model.weights import Weights
from tailorbird.model.writing import write_json, write_tensors
from tailorbird.progress import Progress, Silent
from tailorbird.run.parts import PlacedLinear, linear_shape
from tailorbird.serve.adapters.basis import CORE, PEFT_TYPE
from tailorbird.serve.adapters.joint import MOVES, Basis, shared_basis
from tailorbird.serve.adapters.kinds import open_adapter
from tailorbird.serve.runner import runner_for


@dataclass(frozen=True)
class Shared:
    """What became of an adapter.

    Attributes
    ----------
    name : str
    cluster : int
        Which basis it has.
    lost : float
        Share of its squared norm that the basis doesn't hold, averaged over its linears.
    """

    name: str
    cluster: int
    lost: float


@dataclass(frozen=True)
class ShareResult:
    """Adapters that were written anew.

    Attributes
    ----------
    output : str
    rank, clusters : int
    adapters : list of Shared
        By name.
    bytes_before, bytes_after : int
        Of the tensors of all adapters; after, of all cores and bases.
    """

    output: str
    rank: int
    clusters: int
    adapters: list[Shared]
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, eq=False)
class _Member:
    """An adapter: what it adds to linears, by module path."""

    name: str
    products: dict[str, Product]
    base: object


def share_for_model(
    model: str,
    directories: Sequence[Path],
    output: Path,
    rank: int = 16,
    clusters: int = 1,
    progress: Progress | None = None,
) -> ShareResult:
    """`share` for a model by name; SettingsError, too, where it takes no adapters."""
    progress = progress or Silent()
    progress.stage("model", 0)
    runner = runner_for(load(model), lambda: read_anatomy(open_checkpoint(model)).kv_bytes_per_token)
    if runner.adaptable is None:
        raise SettingsError(
            f"{model}, which takes no adapters: {runner.note}", "a model that is served with adapters",
            "merge each adapter into a checkpoint of its own",
        )  # fmt: skip
    found = share(runner.adaptable.linears, directories, output, rank, clusters, progress)
    written = [*output.glob("*.safetensors"), *(output / one.name / WEIGHTS_FILE for one in found)]
    return ShareResult(
        str(output), rank, clusters, found,
        _tensor_bytes(directory / WEIGHTS_FILE for directory in directories), _tensor_bytes(written),
    )  # fmt: skip


def _tensor_bytes(files: Iterable[Path]) -> int:
    return sum(Weights.open_file(file).total_bytes for file in files)


def share(
    linears: Mapping[str, PlacedLinear],
    directories: Sequence[Path],
    output: Path,
    rank: int = 16,
    clusters: int = 1,
    progress: Progress | None = None,
) -> list[Shared]:
    """Write adapters anew, in shared bases; all of them are in memory meanwhile.

    Parameters
    ----------
    linears : mapping of str to PlacedLinear
        Of the model (`FusedModel.linears`).
    directories : sequence of Path
        Of adapters, whose names are those of the directories.
    output : Path
        Gets ``basis-N.safetensors`` and a directory for each adapter; it must not exist.
    rank : int
        Of the bases; a linear with fewer inputs or outputs gets as much as it has.
    clusters : int
        How many bases.
    progress : Progress, optional

    Returns
    -------
    list of Shared

    Raises
    ------
    SettingsError
        Two of a name, fewer adapters than clusters, a rank that is none, `output` exists, or an adapter that
        is more than a product of two matrices (DoRA, IA3, biases).
    CheckpointError
        As of `kinds.open_adapter`.
    ResourceError
        `output` can't be written.
    """
    progress = progress or Silent()
    _refuse(directories, output, rank, clusters, linears)
    progress.stage("read", len(directories))
    members = []
    for directory in directories:
        members.append(_read(linears, directory))
        progress.advance(note=directory.name)
    of_cluster = _clusters(members, rank, clusters, progress)
    progress.stage("bases", clusters)
    with _appearing(output) as folder:
        found = []
        for cluster in range(clusters):
            own = [member for member, its in zip(members, of_cluster, strict=True) if its == cluster]
            found += _write(folder, cluster, own, _bases(own, rank), rank)
            progress.advance()
    return sorted(found, key=lambda one: one.name)


def _refuse(
    directories: Sequence[Path], output: Path, rank: int, clusters: int, linears: Mapping[str, PlacedLinear]
) -> None:
    names = [directory.resolve().name for directory in directories]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SettingsError(f"two adapters called {twice!r}", "directories of different names", "rename one")
    smallest = min(min(linear_shape(placed.module)) for placed in linears.values())
    if not 1 <= rank <= smallest:
        raise SettingsError(
            f"a basis of rank {rank}", f"1 to {smallest}, the model's narrowest linear", "choose another rank"
        )
    if not 1 <= clusters <= len(names):
        raise SettingsError(
            f"{clusters} bases for {len(names)} adapters", f"1 to {len(names)}", "choose fewer, or give more"
        )
    if output.exists():
        raise SettingsError(
            f"{output}, which exists", "a directory that doesn't", "choose another, or move it"
        )


def _read(linears: Mapping[str, PlacedLinear], directory: Path) -> _Member:
    kind = open_adapter(directory, linears)
    products = {}
    for path in kind.adapted:
        linear = kind.linear(path)
        more = _more(linear) or kind.source.stored_biases
        if more or linear.down is None or not isinstance(linear.up, Tensor):
            raise SettingsError(
                f"{directory}: `{path}` is more than a product of two matrices",
                "LoRA without DoRA and biases, or VeRA",
                "serve this adapter as it is",
            )
        products[path] = Product(linear.scale * linear.up.float(), linear.down.float())
    return _Member(directory.resolve().name, products, kind.source.config.get("base_model_name_or_path"))


def _more(linear: LinearAdapter) -> bool:
    return any(part is not None for part in (linear.inputs, linear.outputs, linear.bias, linear.core))


def _bases(members: Sequence[_Member], rank: int) -> dict[str, Basis]:
    """A basis for each linear that any of these adapters changes."""
    paths = {path: None for member in members for path in member.products}
    return {
        path: shared_basis([m.products[path] for m in members if path in m.products], rank) for path in paths
    }


def _lost(member: _Member, bases: Mapping[str, Basis]) -> float:
    """What an adapter loses in bases; everything where there is none for a linear."""
    losses = [bases[p].lost(product) if p in bases else 1.0 for p, product in member.products.items()]
    return sum(losses) / len(losses)


def _clusters(members: Sequence[_Member], rank: int, clusters: int, progress: Progress) -> list[int]:
    """Which basis each adapter has."""
    if clusters == 1:
        return [0] * len(members)
    # Begin with adapters of which each loses most in the bases of those before.
    progress.stage("clusters", clusters + MOVES)
    bases = [_bases(members[:1], rank)]
    while len(bases) < clusters:
        least = [min(_lost(member, its) for its in bases) for member in members]
        bases.append(_bases([members[least.index(max(least))]], rank))
        progress.advance()
    found: list[int] = []
    for _ in range(MOVES):
        losses = [[_lost(member, its) for its in bases] for member in members]
        moved = [row.index(min(row)) for row in losses]
        for empty in set(range(clusters)) - set(moved):  # it takes the adapter that loses most where it is
            lonely = max(
                (i for i in range(len(members)) if moved.count(moved[i]) > 1),
                key=[row[its] for row, its in zip(losses, moved, strict=True)].__getitem__,
            )
            moved[lonely] = empty
        if moved == found:
            break
        found = moved
        bases = [
            _bases([m for m, its in zip(members, found, strict=True) if its == cluster], rank)
            for cluster in range(clusters)
        ]
        progress.advance()
    return found


def _write(
    folder: Path, cluster: int, members: Sequence[_Member], bases: Mapping[str, Basis], rank: int
) -> list[Shared]:
    name = f"basis-{cluster}.safetensors"
    tensors: dict[str, Tensor] = {}
    for path, basis in bases.items():
        tensors |= {f"{path}.up": basis.up.bfloat16(), f"{path}.down": basis.down.bfloat16()}
    write_tensors(folder / name, tensors)
    digest = Weights.open_file(folder / name).header_digest
    # Cores are the best for the basis as it is stored.
    stored = {path: Basis(tensors[f"{path}.up"].float(), tensors[f"{path}.down"].float()) for path in bases}
    for member in members:
        cores = {path: stored[path].core(product) for path, product in member.products.items()}
        directory = folder / member.name
        directory.mkdir()
        write_tensors(
            directory / WEIGHTS_FILE, {f"{PREFIX}{path}.{CORE}": core for path, core in cores.items()}
        )
        config = {
            "peft_type": PEFT_TYPE, "task_type": "CAUSAL_LM", "r": rank, "basis": name,
            "basis_digest": digest, "target_modules": sorted(cores), "base_model_name_or_path": member.base,
        }  # fmt: skip
        write_json(directory / CONFIG_FILE, config)
    return [Shared(member.name, cluster, _lost(member, stored)) for member in members]


@contextmanager
def _appearing(output: Path) -> Iterator[Path]:
    """A directory that takes its name when all is in it."""
    folder = output.with_name(f"{output.name}.{uuid.uuid4().hex}.partial")  # nobody else's
    try:
        folder.mkdir(parents=True)
        yield folder
        folder.replace(output)
    except OSError as error:
        raise ResourceError(
            f"{output} cannot be written ({error.strerror})", "a directory with enough space",
            "choose another place",
        ) from error  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)
