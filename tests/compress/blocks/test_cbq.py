"""CBQ: the gradients of offsets, what drives them, and windows that learn, resume and stay within memory."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from learned_weights import begun, summed, weight_of
from results import digests
from tailorbird import api
from tailorbird.calibrate.activations import ActivationFile
from tailorbird.calibrate.stream import StreamingModel
from tailorbird.compress import pipeline
from tailorbird.compress.blocks.cbq import Cbq, CbqWeight, distance
from tailorbird.compress.blocks.training import learn
from tailorbird.compress.recipe import make_recipe
from tailorbird.compress.work import open_texts, open_work
from tailorbird.errors import SettingsError
from tailorbird.evaluate.streamed import batches
from tailorbird.formats.packed import IntegerCoding
from tailorbird.linear.quantize.rtn import Rtn
from tailorbird.model.anatomy import read_anatomy
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.model.weights import Weights
from tiny import save_model

SETTINGS = "cbq.steps=12,cbq.batch=4,cbq.rate=0.02"


def learned_weight(coding: IntegerCoding) -> CbqWeight:
    learned = begun(Cbq(), coding)
    assert isinstance(learned, CbqWeight)
    with torch.no_grad():
        learned.right += 0.2 * weight_of(5, 80, 7)
    return learned


def test_gradients_are_those_of_the_formula() -> None:
    """Codes floor(w / s) + [D >= 1/2], by the slope of D = 1.2 sigmoid(V) - 0.1 where that isn't cut."""
    coding = IntegerCoding(2, 32, False)
    learned = learned_weight(coding)
    upstream = weight_of(seed=3)
    (learned() * upstream).sum().backward()
    zeros, scales = learned.each(learned.began.zeros), learned.each(learned.began.scales)
    sigmoid = (learned.start + learned.left @ learned.right).sigmoid().detach()
    offsets = 1.2 * sigmoid - 0.1
    codes = learned.floors + (offsets >= 0.5).float() + zeros
    free = (offsets > 0) & (offsets < 1) & (codes >= 0) & (codes <= 3)
    assert 0.3 < free.float().mean() < 1
    slope = torch.where(free, upstream * scales * 1.2 * sigmoid * (1 - sigmoid), 0.0)
    torch.testing.assert_close(learned.left.grad, slope @ learned.right.detach().t())
    torch.testing.assert_close(learned.right.grad, learned.left.detach().t() @ slope)
    each = upstream * scales * (codes.clamp(0, 3) - zeros)
    torch.testing.assert_close(learned.factors.grad, summed(each, coding), rtol=1e-4, atol=1e-5)


def test_the_product_moves_the_borders_of_rounding() -> None:
    """A weight is rounded up where its rest is beyond 1 - D(A1 A2), whatever the rest is."""
    learned = learned_weight(IntegerCoding(3, 32, False))
    rest = (learned.start.sigmoid() * 1.2 - 0.1).double()
    moved = (learned.left @ learned.right).double()
    border = 1.2 * (-moved).sigmoid() - 0.1
    clear = (rest - border).abs() > 1e-4
    up = learned.from_zero()[0] - learned.floors > 0.5
    assert torch.equal(up[clear], (rest > border)[clear])
    assert up.float().mean() > 0.2


def test_what_drives_offsets_decides_them() -> None:
    learned = learned_weight(IntegerCoding(3, 32, False))
    optimizer = torch.optim.Adam([learned.left, learned.right], lr=0.05)
    before = float(learned.undecided(2.0).detach())
    for _ in range(100):
        optimizer.zero_grad()
        learned.undecided(2.0).backward()
        optimizer.step()
    assert float(learned.undecided(2.0).detach()) < 0.5 * before
    with torch.no_grad():
        learned.left.fill_(1.0)
        learned.right.fill_(9.0)
    assert float(learned.undecided(20.0).detach()) == 0.0


def test_the_distance_is_squares_and_a_divergence() -> None:
    x, y = (torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=y), torch.distributions.Categorical(logits=x)
    )
    torch.testing.assert_close(distance(x, y), ((x - y).square().sum(-1) + divergence).mean())
    assert float(distance(y, y).detach()) == 0.0
    assert torch.autograd.gradcheck(distance, (x, y))


def compress(model: Path, text: Path, output: Path, recipe: str, **settings: Any) -> api.FitResult:
    return api.compress(
        str(model), output, recipe=recipe, calibration=str(text), sequences=12, length=48,
        measure_speed=False, measure_spread=False, max_kl=100.0, max_perplexity_increase=1e9, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_windows_end_nearer_to_the_source(architecture: str, text: Path, tmp_path: Path) -> None:
    layers: dict[str, Any] = {"n_layer": 4} if architecture == "gpt2" else {"num_hidden_layers": 4}
    model = save_model(tmp_path / "model", architecture, dtype=torch.bfloat16, **layers)
    line = f"awq+rtn+cbq:bits=2,group=32,cbq.window=3,cbq.overlap=2,{SETTINGS}"
    result = compress(model, text, tmp_path / "out", line)
    found = next(method for method in result.methods if method["name"] == "cbq")
    assert found["block_error_after"] < found["block_error_before"]


def test_a_window_of_one_is_learning_block_by_block(text: Path, tmp_path: Path) -> None:
    """The same codes as from `learn` on each block, with streams that are held in memory."""
    directory = save_model(tmp_path / "model", "llama")
    recipe = f"rtn+cbq:bits=2,group=32,cbq.window=1,cbq.overlap=0,{SETTINGS}"
    compress(directory, text, tmp_path / "out", recipe)
    stored = Weights.open(tmp_path / "out")
    checkpoint = open_checkpoint(str(directory))
    anatomy = read_anatomy(checkpoint)
    work = open_work(
        str(directory), make_recipe("rtn"), calibration=str(text), evaluation=None, sequences=12, length=48,
        context=None, target=None, seed=0, progress=None,
    )  # fmt: skip
    ids = open_texts(work).calibration.ids
    model = StreamingModel(checkpoint, anatomy)
    method, coding = Cbq(steps=12, batch=4, window=1, overlap=0, rate=0.02), IntegerCoding(2, 32)
    source = result = model.embed(ids)
    for block in anatomy.blocks:
        module = model.load_block(block.index)
        files = [ActivationFile(tmp_path / f"{kind}-{block.index}", *ids.shape, 64) for kind in "xy"]
        run = lambda hidden, module=module, index=block.index: model.run_block(module, index, hidden)  # noqa: E731
        source = torch.cat([run(source[a:b]) for a, b in batches(*ids.shape)])
        files[0].write(0, result)
        files[1].write(0, source)
        weights, rounded = {}, {}
        for place in block.linears:
            weight = model.weight_of(module, place)
            rounded[place.name] = Rtn()(weight, None, coding)
            weights[place.name] = method.begin(weight, rounded[place.name], coding)
            model.set_weight(module, place, rounded[place.name].dequantize())
        modules = {name: model.module_of(module, name) for name in weights}
        found = learn(method, modules, weights, run, *files, block.index, batches(*ids.shape))
        for place in block.linears:
            packed = weights[place.name].packed() if found.better else rounded[place.name]
            assert torch.equal(stored.read(f"{place.name}.codes"), packed.tensors["codes"])
            assert torch.equal(stored.read(f"{place.name}.scales"), packed.tensors["scales"])
            model.set_weight(module, place, packed.dequantize())
        result = torch.cat([run(result[a:b]) for a, b in batches(*ids.shape)])


@pytest.mark.parametrize("recipe", [pytest.param("rtn+eora+cbq", marks=pytest.mark.full), "awq+gptq+cbq"])
def test_a_kill_inside_a_window_ends_with_the_same_bytes(
    recipe: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(tmp_path / "model", "llama", num_hidden_layers=4)
    line = f"{recipe}:bits=2,group=32,{SETTINGS}"
    compress(model, text, tmp_path / "whole", line)
    for name, at in (("learn", 0), ("learn", 2), ("write_tensors", 4), ("write_tensors", 9)):
        left, real = at, getattr(pipeline, name)

        def killed(*arguments: Any, real: Any = real) -> Any:
            nonlocal left
            if not left:
                raise KeyboardInterrupt
            left -= 1
            return real(*arguments)

        output = tmp_path / f"{name}-{at}"
        with monkeypatch.context() as patched:
            patched.setattr(pipeline, name, killed)
            with pytest.raises(KeyboardInterrupt):
                compress(model, text, output, line)
        compress(model, text, output, line, resume=True)
        assert digests(output) == digests(tmp_path / "whole")
        assert not list(output.rglob("*windows*"))


def test_only_the_blocks_of_a_window_are_in_memory(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(tmp_path / "model", "llama", num_hidden_layers=6)
    real, alive, most = StreamingModel.load_block, weakref.WeakSet[nn.Module](), 0
    write, waiting = pipeline.write_tensors, 0

    def write_tensors(*arguments: Any, **settings: Any) -> Any:
        nonlocal waiting
        written = write(*arguments, **settings)
        waiting = max(waiting, len(list(tmp_path.rglob("windows/*.safetensors"))))
        return written

    def load_block(self: StreamingModel, index: int) -> nn.Module:
        nonlocal most
        block = real(self, index)
        alive.add(block)
        most = max(most, len(alive))
        return block

    monkeypatch.setattr(StreamingModel, "load_block", load_block)
    monkeypatch.setattr(pipeline, "write_tensors", write_tensors)
    compress(model, text, tmp_path / "out", f"rtn+cbq:bits=2,group=32,{SETTINGS}")
    assert most == 2  # those of the window; the source's version of one is gone before the next
    assert waiting == 2  # that of a window, while the next one writes its own


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({"window": 2, "overlap": 2}, "overlap 2 of cbq in windows of 2"),
        ({"window": 1}, "overlap 1 of cbq in windows of 1"),
        ({"overlap": -1}, "overlap -1 of cbq"),
        ({"window": 0}, "window 0 of cbq"),
        ({"rank": 0}, "rank 0 of cbq"),
        ({"rounding": -0.1}, "rounding -0.1 of cbq"),
    ],
)
def test_windows_that_there_are_not_are_refused(settings: dict[str, Any], refused: str) -> None:
    with pytest.raises(SettingsError, match=refused):
        Cbq(**settings)
