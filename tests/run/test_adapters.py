"""Tokens with adapters agree with a model whose linears have them, and no token disturbs another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compressed import save_compressed
from tailorbird.formats.packed import IntegerCoding
from tailorbird.kernels import native
from tailorbird.kernels.adapters import Adapter, LinearAdapter, Segment, TiledRows
from tailorbird.model.layout import ModelLayout
from tailorbird.model.load import load
from tailorbird.run.fused import FusedModel
from tailorbird.run.pages import Pages
from tiny import ARCHITECTURES, make_model

pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")

LENGTHS = [5, 40, 1, 33]
TOKENS = sum(LENGTHS)

#: (block, role) -> what an adapter makes of that linear
Change = dict[tuple[int, str], LinearAdapter]


def pair(
    directory: Path, architecture: str, rounds: bool = False, zero: bool = False, **config: Any
) -> tuple[FusedModel, Any, dict[tuple[int, str], str]]:
    """A fused model, the same as dense modules, and the path of every linear by block and role."""

    def layout(stated: ModelLayout) -> ModelLayout:
        modules = {name: replace(module, rounds=rounds) for name, module in stated.modules.items()}
        return replace(stated, modules=modules)

    dense = make_model(architecture, **config)
    if zero:
        with torch.no_grad():
            for layer in dense.model.layers:
                for module in layer.modules():
                    if isinstance(module, nn.Linear):
                        module.weight.zero_()
    save_compressed(directory, dense, IntegerCoding(4, 32), layout=layout)
    model = load(str(directory))
    fused = FusedModel(model)
    names = {module: name for name, module in model.named_modules()}
    paths = {}
    for index, layer in enumerate(fused.parts.layers):
        attention = ("q", "k", "v") if len(layer.attention_in) == 3 else ("qkv",)
        mlp = ("fc1",) if not layer.gated else ("gate", "up") if len(layer.mlp_in) == 2 else ("gate_up",)
        found = dict(zip((*attention, *mlp), (*layer.attention_in, *layer.mlp_in), strict=True))
        found |= {"o": layer.attention_out, "down" if layer.gated else "fc2": layer.mlp_out}
        paths |= {(index, role): names[module] for role, module in found.items()}
    return fused, dense, paths


def shape_of(module: Any) -> tuple[int, int]:
    return tuple(module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape)


def change(kind: str, dense: Any, paths: dict[tuple[int, str], str], rank: int = 8, seed: int = 0) -> Change:
    """A random adapter of some kind on all linears."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def linear(role: str, module: Any) -> LinearAdapter:
        out_features, in_features = shape_of(module)
        own = 1 + int(torch.randint(0, rank, (), generator=generator)) if kind == "mixed" else rank
        down = normal(own, in_features) / in_features**0.5
        up = normal(out_features, own) / own**0.5
        outputs, bias = 1 + 0.3 * normal(out_features), 0.3 * normal(out_features)
        inputs = 1 + 0.3 * normal(in_features) if role in ("o", "down", "fc2") else None
        match kind:
            case "lora":
                return LinearAdapter(down, up, 0.3)
            case "bfloat16":
                return LinearAdapter(down.bfloat16(), up.bfloat16(), 0.3)
            case "dora":
                return LinearAdapter(down, up.bfloat16(), 0.3, outputs=outputs)
            case "ia3":
                return LinearAdapter(inputs=inputs, outputs=None if inputs is not None else outputs)
            case "bias":
                return LinearAdapter(bias=bias)
            case "core":
                return LinearAdapter(down, Shared(up.bfloat16()), 0.3, core=normal(own, own))
            case "int8":
                down, up = ((40 * part).round().clamp(-128, 127).to(torch.int8) for part in (down, up))
                core = normal(own, own) if role in ("o", "v") else None
                return LinearAdapter(down, up, 1e-3, core=core, ranks=normal(own) / 3, outputs=outputs)
        return LinearAdapter(down.bfloat16(), up, -0.4, inputs, outputs, bias)

    return {place: linear(place[1], dense.get_submodule(path)) for place, path in paths.items()}


class Shared(TiledRows):
    """Remembers its matrix."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(matrix)
        self.matrix = matrix


class Adapted(nn.Module):
    """A dense linear, every token with the adapter that `owners` names; its own arithmetic is float64."""

    def __init__(self, module: Any, place: tuple[int, str], owners: list[Tensor], changes: list[Change]):
        super().__init__()
        weight = module.weight.detach().double()
        self.weight = weight.t() if isinstance(module, Conv1D) else weight
        self.bias = None if module.bias is None else module.bias.detach().double()
        self.owners = owners
        self.adapters = [one.get(place, LinearAdapter()) for one in changes]

    def forward(self, x: Tensor) -> Tensor:
        rows, flat = [], x.reshape(-1, x.shape[-1])  # OPT's feed-forward sees no sequences
        for token, owner in enumerate(self.owners[0].tolist()):
            adapter = self.adapters[owner] if owner >= 0 else LinearAdapter()
            weight, bias = self.weight, self.bias
            if adapter.down is not None and adapter.up is not None:
                up = adapter.up.matrix if isinstance(adapter.up, Shared) else adapter.up
                up = up.double() if adapter.core is None else up.double() @ adapter.core.double()
                up = up if adapter.ranks is None else up * adapter.ranks.double()
                weight = weight + adapter.scale * (up @ adapter.down.double())
            if adapter.outputs is not None:
                weight = adapter.outputs.double()[:, None] * weight
            if adapter.inputs is not None:
                weight = weight * adapter.inputs.double()
            bias = bias if adapter.bias is None else adapter.bias.double()
            y = weight @ flat[token].double()
            rows.append(y if bias is None else y + bias)
        return torch.stack(rows).view(*x.shape[:-1], -1).to(x.dtype)


def reference(
    dense: Any, paths: dict[tuple[int, str], str], ids: Tensor, owners: Tensor, changes: list[Change]
) -> Tensor:
    """Logits of sequences of `LENGTHS`, one after the other."""
    current = [owners]
    for place, path in paths.items():
        parent, _, own = path.rpartition(".")
        module = dense.get_submodule(path)
        setattr(dense.get_submodule(parent), own, Adapted(module, place, current, changes))
    found = []
    for part, owner in zip(ids.split(LENGTHS), owners.split(LENGTHS), strict=True):
        current[0] = owner
        with torch.no_grad():
            found.append(dense(part[None], use_cache=False).logits[0].float())
    return torch.cat(found)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, positions and sequences of a packed batch."""
    ids = torch.randint(0, 256, (TOKENS,), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(n, dtype=torch.int32) for n in LENGTHS])
    sequences = torch.arange(len(LENGTHS), dtype=torch.int32).repeat_interleave(torch.tensor(LENGTHS))
    return ids, positions, sequences


def pages(fused: FusedModel) -> Pages:
    made = fused.pages(len(LENGTHS))
    made.reach(max(LENGTHS))
    return made


def step(fused: FusedModel, segments: list[Segment]) -> Tensor:
    return fused.step(*batch(), pages(fused), torch.arange(TOKENS), segments)


def random_segments(count: int, seed: int) -> list[tuple[int, int, int]]:
    """(begin, end, adapter or -1) that cover the batch; they may end within a sequence or span several."""
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randperm(TOKENS - 1, generator=generator)[:7].add(1).sort().values.tolist()
    numbers = torch.randint(-1, count, (8,), generator=generator).tolist()
    return list(zip([0, *cuts], [*cuts, TOKENS], numbers, strict=True))


def owners_of(segments: list[tuple[int, int, int]]) -> Tensor:
    owners = torch.full((TOKENS,), -1)
    for begin, end, number in segments:
        owners[begin:end] = number
    return owners


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_low_rank_adapters_on_all_linears_agree_with_the_modules(architecture: str, tmp_path: Path) -> None:
    fused, dense, paths = pair(tmp_path / "m", architecture)
    changes = [change("lora", dense, paths, rank, seed=rank) for rank in (8, 3)]
    made = [fused.adapter(one) for one in changes]
    segments = [(0, 20, 0), (20, 46, 1), (50, TOKENS, 0)]
    logits = step(fused, [Segment(b, e, made[n]) for b, e, n in segments])
    plain = step(fused, [])
    expected = reference(dense, paths, batch()[0], owners_of(segments), changes)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
    assert float((logits - plain)[:20].abs().max()) > 1e-2  # the adapters matter


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "phi3", "falcon"])
def test_adapters_of_all_kinds_share_a_batch(architecture: str, seed: int, tmp_path: Path) -> None:
    config = {"bias": True} if architecture == "falcon" else {}
    fused, dense, paths = pair(tmp_path / "m", architecture, **config)
    kinds = [
        ("lora", 1),
        ("lora", 64),
        ("bfloat16", 17),
        ("dora", 5),
        ("ia3", 1),
        ("bias", 1),
        ("mixed", 40),
        ("core", 19),
        ("int8", 21),
    ]
    changes = [change(kind, dense, paths, rank, seed=i) for i, (kind, rank) in enumerate(kinds)]
    some = list(changes[0])[seed::3]  # one adapter leaves linears alone
    changes[0] = {place: changes[0][place] for place in some}
    made = [fused.adapter(one) for one in changes]
    segments = random_segments(len(kinds), seed)
    logits = step(fused, [Segment(b, e, made[n]) for b, e, n in segments if n >= 0])
    expected = reference(dense, paths, batch()[0], owners_of(segments), changes)
    torch.testing.assert_close(logits, expected, atol=3e-5, rtol=2e-4)


@pytest.mark.parametrize("version", native.versions())
def test_every_version_agrees(version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, dense, paths = pair(tmp_path / "m", "llama")
    changes = [change("mixed", dense, paths, 20)]
    monkeypatch.setattr("tailorbird.kernels.blocks.best_version", lambda: version)
    logits = step(fused, [Segment(3, 60, fused.adapter(changes[0]))])
    expected = reference(dense, paths, batch()[0], owners_of([(3, 60, 0)]), changes)
    torch.testing.assert_close(logits, expected, atol=3e-5, rtol=2e-4)


def test_low_rank_parts_read_activations_before_they_are_rounded(tmp_path: Path) -> None:
    """With a base of zeros nothing is left of what rounding to bytes would cost, some 1e-3."""
    fused, dense, paths = pair(tmp_path / "m", "llama", rounds=True, zero=True)
    assert all(block.mlp_out.int8 for block in fused.blocks)
    changes = [change("lora", dense, paths, 16)]
    logits = step(fused, [Segment(0, TOKENS, fused.adapter(changes[0]))])
    expected = reference(dense, paths, batch()[0], owners_of([(0, TOKENS, 0)]), changes)
    # The head is rounded, too, and alike: its inputs differ in their last bits only.
    assert float((logits - expected).norm() / expected.norm()) < 6e-3
    hidden = fused.run(
        fused.embed(*batch()[:2]), *batch()[1:], pages(fused),
        adapters=[Segment(0, TOKENS, fused.adapter(changes[0]))],
    )  # fmt: skip
    exact = hidden_reference(dense, batch()[0])
    torch.testing.assert_close(hidden, exact, atol=1e-5, rtol=1e-5)


def hidden_reference(dense: Any, ids: Tensor) -> Tensor:
    """What enters the last norm, of modules that `reference` has changed already."""
    seen: list[Tensor] = []
    handle = dense.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    owners = next(m for m in dense.modules() if isinstance(m, Adapted)).owners
    with torch.no_grad():
        for part in ids.split(LENGTHS):
            owners[0] = torch.zeros(len(part), dtype=torch.long)
            dense(part[None], use_cache=False)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("architecture", ["qwen2", "phi3", "gpt2"])
def test_a_token_has_the_same_bits_whatever_adapters_run_beside_it(
    architecture: str, rounds: bool, tmp_path: Path, threads: None
) -> None:
    fused, dense, paths = pair(tmp_path / "m", architecture, rounds=rounds)
    kinds = ["core", "int8", "dora", "ia3"]
    made = [fused.adapter(change(kind, dense, paths, 11, seed=i)) for i, kind in enumerate(kinds)]
    bounds = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    together = [Segment(b, e, one) for (b, e), one in zip(pairwise(bounds), made, strict=True)]
    alone = [step(fused, [segment]) for segment in together]
    plain = step(fused, [])
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        logits = step(fused, together[::-1])
        without = step(fused, [together[0], together[3]])
        for i, (begin, end) in enumerate(pairwise(bounds)):
            assert torch.equal(logits[begin:end], alone[i][begin:end])
            assert torch.equal(without[begin:end], (alone[i] if i in (0, 3) else plain)[begin:end])
        cut = [Segment(5, 9, made[1]), Segment(9, 30, made[1]), Segment(30, 45, made[1])]
        assert torch.equal(step(fused, cut)[5:45], alone[1][5:45])


def test_one_token_after_the_other_gives_the_bits_of_all_at_once(tmp_path: Path) -> None:
    fused, dense, paths = pair(tmp_path / "m", "qwen2")
    made = fused.adapter(change("mixed", dense, paths, 13))
    ids, positions, _ = batch()
    ids, positions = ids[5:45], positions[5:45]
    zeros = torch.zeros(40, dtype=torch.int32)
    cache = pages(fused)
    together = fused.step(ids, positions, zeros, cache, torch.arange(40), [Segment(0, 40, made)])
    for i in range(40):
        here = slice(i, i + 1)
        one = fused.step(
            ids[here], positions[here], zeros[here], cache, torch.tensor([0]), [Segment(0, 1, made)]
        )
        assert torch.equal(one[0], together[i])


def test_segments_reach_across_the_pieces_in_which_a_long_batch_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, dense, paths = pair(tmp_path / "m", "llama")
    made = [fused.adapter(change(kind, dense, paths, 6)) for kind in ("lora", "core")]
    segments = [Segment(3, 31, made[0]), Segment(31, 65, made[1])]
    whole = step(fused, segments)
    monkeypatch.setattr("tailorbird.run.fused.MOST_TOKENS", 16)
    assert torch.equal(step(fused, segments), whole)


def tensors(fused: FusedModel) -> tuple[Tensor, Tensor]:
    weight = fused.blocks[0].attention_out.weight
    return torch.ones(2, weight.in_features), torch.ones(weight.rows, 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> FusedModel:
    return pair(tmp_path_factory.mktemp("adapters") / "m", "llama")[0]


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ([(0, 10), (9, 20)], "begins at token 9, where another reaches 10"),
        ([(30, 40), (0, 31)], "begins at token 30, where another reaches 31"),
        ([(-1, 5)], "tokens -1 to 5"),
        ([(0, TOKENS + 1)], f"within 0 to {TOKENS}"),
        ([(5, 5)], "at least one token"),
        ([(7, 5)], "at least one token"),
    ],
)
def test_segments_that_overlap_or_leave_the_batch_are_refused(
    model: FusedModel, ranges: list[tuple[int, int]], words: str
) -> None:
    made = model.adapter({(0, "o"): LinearAdapter(*tensors(model))})
    with pytest.raises(ValueError, match=words):
        step(model, [Segment(begin, end, made) for begin, end in ranges])


def test_an_adapter_of_another_model_is_refused(model: FusedModel, tmp_path: Path) -> None:
    other = pair(tmp_path / "m", "llama")[0]
    with pytest.raises(ValueError, match="made for other blocks"):
        step(model, [Segment(0, 4, Adapter(other.blocks, {}))])


@pytest.mark.parametrize(
    ("place", "build", "words"),
    [
        ((2, "o"), lambda a, b: LinearAdapter(a, b), "block 2; expected 0 to 1"),
        ((0, "qkv"), lambda a, b: LinearAdapter(a, b), r"`qkv` in block 0; expected one of \['q', 'k'"),
        ((0, "k"), lambda a, b: LinearAdapter(a, b), r"`up` is \[64, 2\]; expected a tensor of \[32, 2\]"),
        ((0, "o"), lambda a, b: LinearAdapter(a), "one of `down` and `up`"),
        ((0, "o"), lambda a, b: LinearAdapter(a[:, 1:].contiguous(), b), r"`down` is \[2, 63\]"),
        ((0, "o"), lambda a, b: LinearAdapter(a, b[:, :1].contiguous()), r"`up` is \[64, 1\]"),
        ((0, "o"), lambda a, b: LinearAdapter(a[:0], b[:, :0]), "nothing of it empty"),
        ((0, "o"), lambda a, b: LinearAdapter(a[0], b), r"`down` is \[64\]"),
        ((0, "o"), lambda a, b: LinearAdapter(b.t(), b), "not contiguous"),
        ((0, "o"), lambda a, b: LinearAdapter(a.half(), b), "torch.float16"),
        ((0, "o"), lambda a, b: LinearAdapter(a, b.int()), "torch.int32"),
        ((0, "o"), lambda a, b: LinearAdapter(a.to("meta"), b), "on meta"),
        ((0, "o"), lambda a, b: LinearAdapter(inputs=a[0].bfloat16()), "`inputs` is torch.bfloat16"),
        ((0, "o"), lambda a, b: LinearAdapter(outputs=torch.ones(63)), r"`outputs` is \[63\]"),
        ((0, "o"), lambda a, b: LinearAdapter(outputs=torch.ones(1)), r"`outputs` is \[1\]"),
        ((0, "o"), lambda a, b: LinearAdapter(bias=torch.ones(64, 1)), r"`bias` is \[64, 1\]"),
        ((0, "o"), lambda a, b: LinearAdapter(outputs=torch.ones(128)[::2]), "not contiguous"),
        ((0, "o"), lambda a, b: LinearAdapter(a, [1.0]), "`up` is list"),
        ((0, "o"), lambda a, b: LinearAdapter(a, TiledRows(b[:, :1])), r"tiled `up` is \[64, 1\]"),
        ((0, "o"), lambda a, b: LinearAdapter(a, b, core=torch.ones(2, 3)), r"`core` is \[2, 3\]"),
        ((0, "o"), lambda a, b: LinearAdapter(core=torch.ones(2, 2)), "`core` or `ranks` and without"),
        ((0, "o"), lambda a, b: LinearAdapter(a, b, ranks=torch.ones(3)), r"`ranks` is \[3\]"),
        ((0, "v"), lambda a, b: LinearAdapter(inputs=torch.ones(64)), "other linears of the block read"),
    ],
)
def test_what_does_not_fit_a_linear_is_refused(
    model: FusedModel, place: tuple[int, str], build: Any, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        model.adapter({place: build(*tensors(model))})


def test_linears_are_counted_as_the_blocks_have_them(model: FusedModel) -> None:
    with pytest.raises(ValueError, match=r"block 0, linear 7: there is none"):
        Adapter(model.blocks, {(0, 7): LinearAdapter()})
    with pytest.raises(ValueError, match=r"block 5; expected one from 0 to 1"):
        Adapter(model.blocks, {(5, 0): LinearAdapter()})


def block_shape(model: FusedModel, number: int) -> tuple[int, int]:
    """Rows and inputs of a linear of the first block, by its number there."""
    block = model.blocks[0]
    linear = (
        block.attention_in[number] if number < 3 else block.attention_out if number == 3 else block.mlp_out
    )
    return linear.weight.rows, linear.weight.in_features


def test_matrices_that_run_together_lie_side_by_side(model: FusedModel) -> None:
    """All `down` of q, k and v, then all `up`; what several linears have stays where it is."""
    ranks = {0: 3, 1: 5, 2: 4, 3: 2, 6: 7}
    generator = torch.Generator().manual_seed(0)
    shapes = {number: block_shape(model, number) for number in ranks}
    low = {
        number: (
            torch.randn(rank, shapes[number][1], generator=generator),
            torch.randn(shapes[number][0], rank, generator=generator),
        )
        for number, rank in ranks.items()
    }
    adapter = Adapter(model.blocks, {(0, number): LinearAdapter(*pair) for number, pair in low.items()})
    ups = [adapter._table[0][number].up for number in (0, 1, 2, 3, 6)]
    downs = [adapter._table[0][number].down for number in (0, 1, 2, 3, 6)]
    order = [*downs[:3], *ups[:3], downs[3], ups[3], downs[4], ups[4]]
    assert order == sorted(order)
    assert all(address % 64 == 0 for address in order)
    last = -(-shapes[6][0] // 16) * 16 * ranks[6] * 4
    gaps = 64 * len(order)
    assert order[-1] + last - order[0] <= adapter.nbytes + gaps

    common, up = low[0][0], low[0][1]
    shared = Adapter(model.blocks, {(i, 0): LinearAdapter(common, up) for i in range(2)})
    assert {shared._table[i][0].down for i in range(2)} == {common.data_ptr()}
    assert shared._table[0][0].up != shared._table[1][0].up


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("llama", "lora"),
        ("llama", "dora"),
        ("llama", "ia3"),
        ("qwen2", "ia3"),
        ("gpt2", "lora"),
        ("qwen2", "dora"),
    ],
)
def test_adapters_of_peft_agree_with_peft(architecture: str, kind: str, tmp_path: Path) -> None:
    """Where a base has a bias, DoRA leaves it and IA3 multiplies it."""
    peft = pytest.importorskip("peft")
    fused, dense, paths = pair(tmp_path / "m", architecture)
    targets = [path for (_, role), path in paths.items() if kind != "ia3" or role in ("k", "v", "down")]
    if kind == "ia3":
        config = peft.IA3Config(
            target_modules=targets, feedforward_modules=[path for path in targets if "down" in path]
        )
    else:
        config = peft.LoraConfig(r=8, lora_alpha=12, target_modules=targets, use_dora=kind == "dora")
    wrapped = peft.get_peft_model(dense, config).eval()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "ia3_" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(parameter + 0.2 * noise)
    changes: Change = {}
    for place, path in paths.items():
        if path not in targets:
            continue
        module = dense.get_submodule(path)
        if kind == "ia3":
            factors = module.ia3_l["default"].detach().reshape(-1)
            bias = None if module.bias is None else factors * module.bias.detach()
            inside = LinearAdapter(inputs=factors)
            changes[place] = inside if place[1] == "down" else LinearAdapter(outputs=factors, bias=bias)
            continue
        down, up = (part["default"].weight.detach() for part in (module.lora_A, module.lora_B))
        scale, outputs = float(module.scaling["default"]), None
        if kind == "dora":
            magnitude = module.lora_magnitude_vector["default"].weight.detach()
            outputs = magnitude / (module.weight + scale * up @ down).detach().norm(dim=1)
        changes[place] = LinearAdapter(down, up, scale, outputs=outputs)
    made, ids = fused.adapter(changes), batch()[0]
    with torch.no_grad():
        expected = torch.cat([wrapped(part[None], use_cache=False).logits[0] for part in ids.split(LENGTHS)])
    logits = step(fused, [Segment(0, TOKENS, made)])
    torch.testing.assert_close(logits, expected, atol=3e-5, rtol=2e-4)
    assert float((logits - step(fused, [])).abs().max()) > 1e-2
