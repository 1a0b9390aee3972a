"""Compressed checkpoints load through transformers, with the shapes they state and the bits they hold."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from compressed import INT4, linears, save_compressed
from tailorbird.errors import CheckpointError, UnsupportedArchitecture
from tailorbird.formats.modules import CompressedEmbedding, CompressedLinear
from tailorbird.formats.packed import (
    BinaryCoding,
    CodebookCoding,
    DoubleCoding,
    FloatCoding,
    IntegerCoding,
    TableCoding,
    coding_to_dict,
)
from tailorbird.model.layout import BlockLayout, ModelLayout
from tailorbird.model.load import load, load_tokenizer
from tiny import ARCHITECTURES, byte_tokenizer, make_model

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3]])


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def tensors_of(directory):
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as content:
            found |= {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loaded_model_computes_with_the_rounded_weights(tmp_path, architecture, caplog):
    source = save_compressed(tmp_path, make_model(architecture), embedding=IntegerCoding(8, 32), ordered=True)
    with caplog.at_level(logging.WARNING):
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not [r.getMessage() for r in caplog.records if "REPORT" in r.getMessage()]
    packed = [m for m in model.modules() if isinstance(m, CompressedLinear)]
    assert len(packed) >= len(linears(source))
    assert isinstance(model.get_input_embeddings(), CompressedEmbedding)
    torch.testing.assert_close(logits(model), logits(source), atol=2e-4, rtol=2e-4)
    assert torch.equal(logits(load(tmp_path)), logits(model))


@pytest.mark.parametrize(
    "coding",
    [
        *(CodebookCoding("nf4", 32), CodebookCoding("fp4", 32), DoubleCoding("nf4", 32)),
        *(TableCoding(4), TableCoding(3, "float16"), BinaryCoding(32)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codebooks_and_tables_load_compute_and_are_saved_again(tmp_path, dtype, coding):
    model = make_model("llama", tie_word_embeddings=True).to(dtype)
    source = save_compressed(tmp_path / "a", model, coding, embedding=coding, ordered=True)
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=dtype)
    linear = first.model.layers[0].self_attn.q_proj
    assert linear.coding == coding
    assert linear.zeros is None
    assert (linear.tables is None) == (linear.scales is not None)
    tolerance = {"atol": 2e-4, "rtol": 2e-4} if dtype == torch.float32 else {"atol": 5e-2, "rtol": 5e-2}
    torch.testing.assert_close(logits(first), logits(source), **tolerance)
    first.save_pretrained(tmp_path / "b")
    assert torch.equal(logits(load(tmp_path / "b")), logits(first))
    a, b = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_import_of_tailorbird_is_enough_in_either_order(tmp_path):
    save_compressed(tmp_path, make_model("llama"))
    program = (
        "{first}\n"
        "assert {transformers_loaded} == ('transformers' in sys.modules)\n"
        "{second}\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)\n"
        "assert not any('tailorbird' in type(f).__module__ for f in sys.meta_path)"
    )
    ours = "from tailorbird.model.registration import register_on_import; register_on_import()"
    theirs = "import transformers.quantizers.auto"
    for first, second, loaded in ((ours, "", False), (theirs, ours, True)):
        text = "import sys\n" + program.format(first=first, second=second, transformers_loaded=loaded)
        run = subprocess.run(
            [sys.executable, "-c", text, tmp_path], capture_output=True, text=True, check=False
        )
        assert run.stdout.strip() == "CompressedLinear", run.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_tensors_keep_their_bits_whatever_dtype_is_asked(tmp_path, dtype):
    save_compressed(
        tmp_path,
        make_model("qwen2", dtype=torch.bfloat16),
        lambda name: IntegerCoding(3, 32, scale_dtype="float16" if "q_proj" in name else "bfloat16"),
        embedding=IntegerCoding(8, 64),
    )
    stored = tensors_of(tmp_path)
    model = load(tmp_path, dtype=dtype)
    state = model.state_dict()
    assert state.keys() == stored.keys()
    for name, tensor in stored.items():
        kept = name.rsplit(".", 1)[1] in ("codes", "scales", "zeros", "order")
        assert state[name].dtype == (tensor.dtype if kept else dtype)
        assert torch.equal(state[name], tensor.to(state[name].dtype))
    assert logits(model).dtype == dtype


def test_tied_pair_is_stored_once_and_shared(tmp_path):
    model = make_model("llama", tie_word_embeddings=True)
    save_compressed(tmp_path / "a", model, embedding=IntegerCoding(6, 64))
    loaded = load(tmp_path / "a")
    names = [name for name in tensors_of(tmp_path / "a") if "lm_head" in name or "embed" in name]
    assert sorted(names) == [f"model.embed_tokens.{part}" for part in ("codes", "scales", "zeros")]
    assert loaded.lm_head.codes is loaded.model.embed_tokens.codes
    assert loaded.all_tied_weights_keys == {}
    loaded.tie_weights()
    loaded.model.embed_tokens.codes.zero_()
    assert int(loaded.lm_head.codes.sum()) == 0


def test_a_tied_pair_that_stays_float_is_tied_by_transformers(tmp_path):
    source = save_compressed(tmp_path, make_model("llama", tie_word_embeddings=True))
    loaded = load(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    torch.testing.assert_close(logits(loaded), logits(source), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_save_pretrained_round_trips(tmp_path, tied):
    model = make_model("llama", dtype=torch.bfloat16, tie_word_embeddings=tied, attention_bias=True)
    blocks = {0: BlockLayout(attention=False)}
    model.model.layers[0].self_attn = torch.nn.Identity()
    save_compressed(
        tmp_path / "a", model, embedding=IntegerCoding(8, 32), blocks=blocks, tokenizer=byte_tokenizer()
    )
    first = load(tmp_path / "a")
    first.save_pretrained(tmp_path / "b")
    second = load(tmp_path / "b")
    assert torch.equal(logits(first), logits(second))
    a, b = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)
    configs = [json.loads((tmp_path / d / "config.json").read_text()) for d in "ab"]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_maps_are_accepted(tmp_path, device_map):
    save_compressed(tmp_path, make_model("llama", tie_word_embeddings=True), embedding=INT4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert torch.equal(logits(model), logits(load(tmp_path)))


class Pruned:
    """A llama whose blocks differ in heads, width and sublayers, built by hand in dense modules."""

    def __init__(self):
        model = make_model("llama", num_hidden_layers=4, attention_bias=True, mlp_bias=True)
        self.blocks = {
            0: BlockLayout(attention=False),
            1: BlockLayout(num_attention_heads=2, num_key_value_heads=1),
            2: BlockLayout(mlp=False),
            3: BlockLayout(num_attention_heads=3, num_key_value_heads=3),
        }
        layers = model.model.layers
        for index, heads, shared in ((1, 2, 1), (3, 3, 3)):
            attention = layers[index].self_attn
            for name, count in (("q_proj", heads), ("k_proj", shared), ("v_proj", shared)):
                setattr(attention, name, self.linear(64, count * 16))
            attention.o_proj = self.linear(heads * 16, 64)
            attention.num_key_value_groups = heads // shared
        for index, width in ((0, 96), (1, 33), (3, 224)):
            mlp = layers[index].mlp
            mlp.gate_proj, mlp.up_proj = self.linear(64, width), self.linear(64, width)
            mlp.down_proj = self.linear(width, 64)
        # what the checkpoint leaves out, the reference computes and multiplies by zero
        self.zeroed = (layers[0].self_attn.o_proj, layers[2].mlp.down_proj)
        with torch.no_grad():
            for module in self.zeroed:
                module.weight.zero_()
                module.bias.zero_()
        self.model = model.eval()

    @staticmethod
    def linear(n, m):
        return torch.nn.Linear(n, m)

    def save(self, directory, coding):
        absent = ("model.layers.0.self_attn", "model.layers.2.mlp")

        def drop(layout):
            modules = {k: v for k, v in layout.modules.items() if not k.startswith(absent)}
            return ModelLayout(modules, layout.embedding, layout.head, layout.tied, layout.blocks)

        from tailorbird.model.checkpoint import write_tensors

        save_compressed(directory, self.model, coding, blocks=self.blocks, layout=drop)
        with torch.no_grad():
            for module in self.zeroed:  # rounding made them non-zero again where zero is no grid point
                module.weight.zero_()
        kept = {k: v for k, v in tensors_of(directory).items() if not k.startswith(absent)}
        write_tensors(directory / "model.safetensors", kept)


@pytest.mark.parametrize("coding", [INT4, FloatCoding("float32")], ids=["int4", "float"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_pruned_shapes_and_absent_sublayers_equal_the_dense_model(tmp_path, coding, implementation):
    pruned = Pruned()
    pruned.save(tmp_path, coding)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
    reference = pruned.model
    reference.set_attn_implementation(implementation)
    torch.testing.assert_close(logits(model), logits(reference), atol=1e-4, rtol=1e-4)
    arguments = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 257}
    batch = torch.cat([IDS, IDS.flip(1)])
    mask = torch.ones_like(batch)
    mask[1, :4] = 0  # left padding: positions and masks depend on the cache's length
    for chosen in ({"use_cache": True}, {"use_cache": True, "num_beams": 2}):
        expected = reference.generate(batch, attention_mask=mask, **arguments, **chosen)
        assert torch.equal(model.generate(batch, attention_mask=mask, **arguments, **chosen), expected)


def test_absent_attention_under_sliding_windows(tmp_path):
    """The cache of a sliding layer without attention counts tokens beyond its window too."""
    model = make_model("gemma2", num_hidden_layers=4)
    for index in (0, 1):
        torch.nn.init.zeros_(model.model.layers[index].self_attn.o_proj.weight)
    absent = {index: BlockLayout(attention=False) for index in (0, 1)}
    prefixes = tuple(f"model.layers.{index}.self_attn" for index in absent)

    def drop(layout):
        modules = {k: v for k, v in layout.modules.items() if not k.startswith(prefixes)}
        return ModelLayout(modules, layout.embedding, layout.head, layout.tied, layout.blocks)

    from tailorbird.model.checkpoint import write_tensors

    save_compressed(tmp_path, model, FloatCoding("float32"), blocks=absent, layout=drop)
    kept = {k: v for k, v in tensors_of(tmp_path).items() if not k.startswith(prefixes)}
    write_tensors(tmp_path / "model.safetensors", kept)
    arguments = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 257}
    assert torch.equal(load(tmp_path).generate(IDS, **arguments), model.generate(IDS, **arguments))


def test_heads_of_their_own_are_refused_where_the_model_takes_them_from_its_config(tmp_path):
    model = make_model("phi3")
    save_compressed(tmp_path, model, blocks={0: BlockLayout(num_attention_heads=2, num_key_value_heads=1)})
    with pytest.raises(UnsupportedArchitecture, match="phi3"):
        load(tmp_path)


def change(directory, edit):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    edit(config["quantization_config"])
    path.write_text(json.dumps(config))


NAME = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda q: q.update(schema=2), "schema 2"),
        (lambda q: q.update(sparsity={}), "sparsity"),
        (lambda q: q["modules"][NAME].update(low_rank=4), "low_rank"),
        (lambda q: q["modules"][NAME]["coding"].update(kind="codebook"), "codebook"),
        (lambda q: q["modules"][NAME]["coding"].update(outliers=1), "outliers"),
        (lambda q: q.update(blocks={"0": {"attention": "linear"}}), "linear"),
        (lambda q: q.update(blocks={"0": {"experts": 4}}), "experts"),
        (lambda q: q.update(blocks={"9": {"mlp": "absent"}}), "block 9"),
        (lambda q: q["modules"].update({"model.layers.0.mlp.side": q["modules"][NAME]}), "mlp.side"),
        (lambda q: q["modules"][NAME].update(out=80), NAME),
        (lambda q: q["modules"][NAME]["coding"].update(bits=8), NAME),
        (lambda q: q["modules"][NAME].update(coding=coding_to_dict(CodebookCoding("nf4", 32))), "zeros"),
        (
            lambda q: q["modules"][NAME].update(
                coding={**coding_to_dict(CodebookCoding("nf4", 32)), "codebook": "nf3"}
            ),
            "nf3",
        ),
        (lambda q: q["modules"][NAME]["coding"].update(symmetric=True), NAME + ".zeros"),
        (lambda q: q["modules"][NAME]["coding"].update(scale_dtype="float16"), NAME + ".scales"),
        (lambda q: q["modules"][NAME].update(bias=True), NAME + ".bias"),
        (lambda q: q["modules"][NAME].update(order=True), NAME + ".order"),
        (lambda q: q["modules"].pop(NAME), NAME),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tmp_path, edit, named):
    save_compressed(tmp_path, make_model("llama"))
    change(tmp_path, edit)
    with pytest.raises(CheckpointError, match=named.replace(".", r"\.")):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", [NAME + ".scales", "model.norm.weight"])
def test_missing_and_extra_tensors_are_refused_by_name(tmp_path, name):
    from tailorbird.model.checkpoint import write_tensors

    save_compressed(tmp_path, make_model("llama"))
    stored = tensors_of(tmp_path)
    write_tensors(tmp_path / "model.safetensors", {k: v for k, v in stored.items() if k != name})
    with pytest.raises(CheckpointError, match=name):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    write_tensors(tmp_path / "model.safetensors", {**stored, "extra." + name: torch.zeros(2)})
    with pytest.raises(CheckpointError, match="extra." + name):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_changed_body_is_found_when_verification_is_asked_for(tmp_path):
    save_compressed(tmp_path, make_model("llama"), tokenizer=byte_tokenizer())
    load(tmp_path, verify=True)
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    load(tmp_path)
    with pytest.raises(CheckpointError, match="changed after it was written"):
        load(tmp_path, verify=True)
    assert load_tokenizer(tmp_path)("ab").input_ids == byte_tokenizer()("ab").input_ids


def test_a_dense_model_is_not_compressed_while_it_is_loaded(tmp_path):
    from tailorbird.model.quantizer import TailorbirdConfig

    make_model("llama").save_pretrained(tmp_path)
    empty = TailorbirdConfig(**ModelLayout({}).to_dict())
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=empty)


def test_a_model_without_head_loads_from_a_checkpoint_with_one(tmp_path):
    from transformers import AutoModel

    save_compressed(tmp_path, make_model("llama"), embedding=INT4)
    body, whole = AutoModel.from_pretrained(tmp_path), load(tmp_path)
    with torch.no_grad():
        assert torch.equal(body(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)
