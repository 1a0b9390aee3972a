"""What holds for every method of PEFT, on dense and on packed weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from compressed import save_compressed
from tailorbird.adapt.methods.adapter import Attached, Place
from tailorbird.adapt.methods.attach import attach
from tailorbird.adapt.methods.peft.adalora import AdaLora
from tailorbird.adapt.methods.peft.c3a import C3a
from tailorbird.adapt.methods.peft.dora import Dora
from tailorbird.adapt.methods.peft.ia3 import IA3
from tailorbird.adapt.methods.peft.injected import Injected
from tailorbird.adapt.methods.peft.layernorm import LayerNorm
from tailorbird.adapt.methods.peft.loha import LoHa
from tailorbird.adapt.methods.peft.lokr import LoKr
from tailorbird.adapt.methods.peft.pissa import Pissa
from tailorbird.adapt.methods.peft.vblora import VbLora
from tailorbird.adapt.methods.peft.vera import Vera
from tailorbird.adapt.places import places_of
from tailorbird.adapt.save import write_adapter
from tailorbird.adapt.wrap import attached
from tailorbird.errors import SettingsError
from tailorbird.formats.modules import CompressedEmbedding, CompressedLinear
from tailorbird.model.anatomy import read_anatomy
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.model.load import load
from tiny import make_model, save_model
from tuning import merge

peft = pytest.importorskip("peft")

METHODS: dict[str, Any] = {
    "dora": Dora(rank=4),
    "pissa": Pissa(rank=4),
    "adalora": AdaLora(rank=2, initial=4),
    "vera": Vera(rank=32),
    "vblora": VbLora(rank=2, vectors=16, length=32),
    "c3a": C3a(block=32),
    "c3a from zeros": C3a(block=16, start="zeros"),
    "loha": LoHa(rank=3),
    "lokr": LoKr(rank=2, factor=4),
    "lokr of two": LoKr(rank=1, factor=8, both=True),
    "ia3": IA3(),
    "layernorm": LayerNorm(),
}
#: those whose start is random in all factors
ELSEWHERE = {"vblora", "c3a"}
#: those that PEFT has for nn.Linear alone
LINEAR_ONLY = {"c3a", "c3a from zeros", "loha", "lokr", "lokr of two"}
BASES = ("float32", "bfloat16", "gpt2", "packed", "packed gpt2")
IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(3))

Base = tuple[Callable[[], Any], Any]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    """Models that can be loaded anew, and their anatomies."""
    folder = tmp_path_factory.mktemp("bases")
    save_model(folder / "float32")
    save_model(folder / "bfloat16", dtype=torch.bfloat16)
    save_model(folder / "gpt2", "gpt2")
    save_compressed(folder / "packed", make_model("llama"))
    save_compressed(folder / "packed gpt2", make_model("gpt2"))
    made = {}
    for name in BASES:
        model, anatomy = load(str(folder / name)), read_anatomy(open_checkpoint(str(folder / name)))
        made[name] = (lambda model=model: copy.deepcopy(model), anatomy)
    return made


def put(
    bases: Mapping[str, Base], base: str, method: Any, targets: tuple[str, ...] = ("all",), seed: int = 0
) -> tuple[Any, Attached, dict[str, Place]]:
    """A fresh model with a method in it."""
    make, anatomy = bases[base]
    model = make()
    places = places_of(model, anatomy, targets)
    return model, attach(method, model, places, torch.Generator().manual_seed(seed)), places


def run(model: Any, method: Attached, places: Mapping[str, Place]) -> Tensor:
    with attached(model, places, method):
        logits: Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


def loss_of(model: Any, method: Attached, places: Mapping[str, Place]) -> Tensor:
    logits = run(model, method, places)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def move(method: Attached, size: float = 0.05, seed: int = 1) -> None:
    """Let everything that is learned be somewhere else than at the start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def steps(
    model: Any, method: Attached, places: Mapping[str, Place], first: int, last: int, of: int, optimizer: Any
) -> list[float]:
    losses = []
    for step in range(first, last):
        method.before_step(step, of)
        loss = loss_of(model, method, places)
        penalty = method.penalty()
        (loss if penalty is None else loss + penalty).backward()
        method.after_gradients(step)
        optimizer.step()
        method.after_update(step)
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def combinations() -> list[Any]:
    return [
        pytest.param(name, base, id=f"{name}-{base}")
        for name in METHODS
        for base in BASES
        if not (name in LINEAR_ONLY and base == "gpt2")
    ]


def dense_copy(model: Any) -> Any:
    """The model with nn.Linear and nn.Embedding of the same values, float32, for its packed modules."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, CompressedLinear):
                dense = nn.Linear(module.in_features, module.out_features, module.bias is not None)
                dense.weight = nn.Parameter(module.weight.as_subclass(Tensor).clone())
                if module.bias is not None:
                    dense.bias = nn.Parameter(module.bias.detach().clone())
                setattr(parent, name, dense)
            assert not isinstance(module, CompressedEmbedding)
    return model


@pytest.mark.parametrize(("name", "base"), combinations())
def test_tuning_begins_at_the_model_in_its_dtype_and_learns_in_float32(
    name: str, base: str, bases: dict[str, Base]
) -> None:
    expected = bases[base][0]()(input_ids=IDS, use_cache=False).logits
    model, method, places = put(bases, base, METHODS[name])
    found = run(model, method, places)
    assert found.dtype == expected.dtype
    assert {one.dtype for one in method.parameters()} == {torch.float32}
    if name in ELSEWHERE:
        assert not torch.equal(found, expected)
    elif base == "bfloat16" and name == "dora":
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)  # a quotient of lengths of about 1
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    if not isinstance(method, Injected):
        return
    learned = {id(one) for one in method.parameters()}
    assert not any(one.requires_grad for one in model.parameters() if id(one) not in learned)
    assert not any("." in key for key, _ in method.named_parameters())


@pytest.mark.parametrize(
    ("name", "base"), [one for one in combinations() if one.values[1] in ("bfloat16", "gpt2", "packed")]
)
def test_a_few_steps_make_the_loss_less(name: str, base: str, bases: dict[str, Base]) -> None:
    model, method, places = put(bases, base, METHODS[name])
    optimizer = torch.optim.Adam(method.parameters(), lr=0.02 if name != "vblora" else 0.05)
    losses = steps(model, method, places, 0, 5, 5, optimizer)
    assert losses[-1] < losses[0] - 0.005


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("base", ["packed", "packed gpt2"])
def test_gradients_on_packed_weights_are_those_on_dense_ones(
    name: str, base: str, bases: dict[str, Base]
) -> None:
    make, anatomy = bases[base]
    grads = []
    for model in (make(), dense_copy(make())):
        places = {  # GPT-2's linears are no Conv1D here
            path: Place(**{**vars(place), "transposed": False})
            for path, place in places_of(model, anatomy).items()
        }
        method = attach(METHODS[name], model, places, torch.Generator().manual_seed(0))
        move(method)
        loss_of(model, method, places).backward()
        grads.append({key: one.grad for key, one in method.named_parameters() if one.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    for key, found in grads[0].items():
        assert found.abs().max() > 0, key
        torch.testing.assert_close(found, grads[1][key], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("vblora", "dora")])
def test_gradients_are_what_differences_say(name: str, bases: dict[str, Base]) -> None:
    """In float64, but for norms; DoRA's lengths are constants to its gradient, mixtures of VB-LoRA jump."""
    model, method, places = put(bases, "float32", METHODS[name])
    model.double()
    method.double()
    for module in model.modules():  # buffers that aren't children
        if hasattr(module, "vera_A") and module.vera_A is not None:
            module.vera_A.double(), module.vera_B.double()
    move(method)
    loss_of(model, method, places).backward()
    for parameter in list(method.parameters())[:6]:
        if not parameter.requires_grad:
            continue
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)).double()
        measured = []
        with torch.no_grad():
            for sign in (1, -1):
                parameter.add_(direction, alpha=sign * 3e-4)
                measured.append(float(loss_of(model, method, places)))
                parameter.sub_(direction, alpha=sign * 3e-4)
        expected = (measured[0] - measured[1]) / 6e-4
        assert float((parameter.grad * direction).sum()) == pytest.approx(expected, rel=2e-3, abs=2e-5)


def save(method: Attached, places: Mapping[str, Place], directory: Path) -> None:
    """As `tailorbird tune` saves."""
    directory.mkdir()
    write_adapter(directory, places, method, list(places), "base", {})


@pytest.mark.parametrize(("name", "base"), [*combinations(), *((name, "some packed") for name in METHODS)])
def test_plain_peft_loads_what_is_written(
    name: str, base: str, bases: dict[str, Base], tmp_path: Path
) -> None:
    targets = ("o", "down") if base == "some packed" else ("all",)
    base = base.removeprefix("some ")
    model, method, places = put(bases, base, METHODS[name], targets)
    move(method)
    expected = run(model, method, places)
    save(method, places, tmp_path / "a")
    made = peft.PeftModel.from_pretrained(bases[base][0](), tmp_path / "a").eval()
    tolerance = 0.05 if base == "bfloat16" else 1e-4
    torch.testing.assert_close(
        made(input_ids=IDS, use_cache=False).logits, expected, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("name", [name for name in METHODS if name != "pissa"])
def test_the_files_are_those_of_save_pretrained(name: str, bases: dict[str, Base], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    _, method, _ = put(bases, "float32", METHODS[name])
    assert isinstance(method, Injected)
    move(method)
    tensors, config = method.files() or ({}, {})
    method.peft_model.save_pretrained(tmp_path)
    expected = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    stated = json.loads((tmp_path / "adapter_config.json").read_text())
    for one in (config, stated):
        for key, value in one.items():
            one[key] = sorted(value) if isinstance(value, list) else value
    assert config == stated


@pytest.mark.parametrize(
    ("name", "base"),
    [*((name, "packed") for name in METHODS), ("adalora", "bfloat16"), ("layernorm", "bfloat16")],
)
def test_a_second_attach_continues_exactly(name: str, base: str, bases: dict[str, Base]) -> None:
    def begun() -> tuple[Any, Attached, Any, Any]:
        model, method, places = put(bases, base, METHODS[name], seed=7)
        return model, method, places, torch.optim.Adam(method.parameters(), lr=0.01)

    model, method, places, optimizer = begun()
    steps(model, method, places, 0, 4, 8, optimizer)
    state = copy.deepcopy((method.state_dict(), method.extra(), optimizer.state_dict()))
    expected = steps(model, method, places, 4, 8, 8, optimizer)
    end = run(model, method, places)
    model, method, places, optimizer = begun()
    method.take_extra(json.loads(json.dumps(state[1])))
    method.load_state_dict(state[0])
    optimizer.load_state_dict(state[2])
    assert steps(model, method, places, 4, 8, 8, optimizer) == expected
    assert torch.equal(run(model, method, places), end)


@pytest.mark.parametrize("name", METHODS)
def test_the_start_depends_on_the_generator_alone(name: str, bases: dict[str, Base]) -> None:
    torch.manual_seed(1)
    first = put(bases, "float32", METHODS[name], seed=2)[1]
    state = torch.get_rng_state()
    second = put(bases, "float32", METHODS[name], seed=2)[1]
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("name", "base"), [one for one in combinations() if "packed" not in one.id])
def test_merging_gives_the_model_what_it_learned(name: str, base: str, bases: dict[str, Base]) -> None:
    model, method, places = put(bases, base, METHODS[name])
    move(method, 0.02)
    expected = run(model, method, places)
    if isinstance(method, Injected):
        deltas = {path: method.delta(path) for path in places}
        before = {path: place.weight().clone() for path, place in places.items()}
        dtype = next(iter(places.values())).module.weight.dtype
        method.peft_model.merge_and_unload().to(dtype)  # PEFT leaves norms as they were learned, in float32
        for path, delta in deltas.items():
            if delta is not None and base != "bfloat16":
                torch.testing.assert_close(places[path].weight(), before[path] + delta, rtol=1e-5, atol=1e-6)
    else:
        merge(places, method)
    found = model(input_ids=IDS, use_cache=False).logits
    assert not any("peft" in type(module).__module__ for module in model.modules())
    assert {one.dtype for one in model.parameters()} == {found.dtype}
    tolerance = 0.06 if base == "bfloat16" else 1e-4
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", sorted(LINEAR_ONLY))
def test_conv1d_is_refused_before_the_model_changes(name: str, bases: dict[str, Base]) -> None:
    make, anatomy = bases["gpt2"]
    model = make()
    with pytest.raises(SettingsError, match="Conv1D"):
        attach(METHODS[name], model, places_of(model, anatomy), torch.Generator())
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (VbLora(length=48), "length 48"),
        (VbLora(length=100), "length 100"),
        (VbLora(length=32, rank=33), "rank 33 of vblora for .* at most 32"),
        (Pissa(rank=33), "rank 33 of pissa for .* at most 32"),
        (Dora(rank=33), "rank 33 of dora for .* at most 32"),
        (AdaLora(rank=2, initial=33), "initial 33 of adalora for .* at most 32"),
        (LoHa(rank=33), "rank 33 of loha for .* at most 32"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_model_changes(
    method: Any, message: str, bases: dict[str, Base]
) -> None:
    make, anatomy = bases["packed"]
    model = make()
    with pytest.raises(SettingsError, match=message):
        attach(method, model, places_of(model, anatomy), torch.Generator())
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Dora, {"rank": 0}),
        (Dora, {"alpha": 0.0}),
        (Pissa, {"rank": 0}),
        (AdaLora, {"rank": 12}),
        (AdaLora, {"first": 0.5, "last": 0.5}),
        (AdaLora, {"every": 0}),
        (Vera, {"start": 0.0}),
        (VbLora, {"top": 1}),
        (C3a, {"block": 0}),
        (C3a, {"start": "ones"}),
        (LoHa, {"rank": 0}),
        (LoKr, {"factor": 0}),
    ],
)
def test_settings_out_of_range_are_refused(kind: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        kind(**settings)


def test_a_model_holds_one_adapter_of_peft(bases: dict[str, Base]) -> None:
    model, _, places = put(bases, "float32", IA3())
    with pytest.raises(SettingsError, match="already"):
        Vera().attach_to(model, places, torch.Generator())
