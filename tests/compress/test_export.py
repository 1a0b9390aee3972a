"""Exports hold the packed model exactly, are opened by other tools, or are refused by name."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors import safe_open
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from compressed import save_compressed
from tailorbird.compress import export as module
from tailorbird.compress import gguf_file
from tailorbird.compress.export import check_gguf_architecture, export
from tailorbird.compress.stored_model import StoredModel
from tailorbird.errors import CheckpointError, ExportError, SettingsError
from tailorbird.formats.packed import BinaryCoding, CodebookCoding, IntegerCoding, TableCoding
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.model.layout import BlockLayout
from tailorbird.model.load import load
from tiny import byte_tokenizer, make_model

TEXT = "def add(first, second):\n    return first + second  # 12 cafés, 3.50 € and 日本語\n\n\n" * 20
SPLITS = {
    "llama-bpe": gguf_file._LETTERS + r"\p{N}{1,3}" + gguf_file._REST,
    "qwen2": gguf_file._LETTERS + r"\p{N}" + gguf_file._REST,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def splitter(pre):
    if pre == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = pre_tokenizers.Split(Regex(SPLITS[pre]), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def trained_tokenizer(pre="gpt-2", size=320):
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = splitter(pre)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{{ messages[0].content }}",
    )


def some_coding(symmetric, scale_dtype="bfloat16", groups=(32, 64, 0)):
    """A function that gives each linear another coding; `symmetric` None takes turns."""
    counter = iter(range(10**6))

    def choose(name):
        i = next(counter)
        chosen = i // 6 % 2 == 0 if symmetric is None else symmetric
        return IntegerCoding((4, 3, 2, 5, 8, 6)[i % 6], groups[i % len(groups)], chosen, scale_dtype)

    return choose


def gguf_model(directory, architecture="llama", tokenizer=None, coding=None, **changes):
    tokenizer = tokenizer or trained_tokenizer()
    changes = {"vocab_size": 330, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, **changes}
    model = make_model(architecture, dtype=torch.bfloat16, **changes)
    save_compressed(
        directory,
        model,
        coding or some_coding(True, "float16"),
        embedding=IntegerCoding(8, 32, True, "float16"),
        tokenizer=tokenizer,
    )
    return directory


@pytest.fixture
def unchecked(monkeypatch):
    """Leaves out the comparison in a fresh process, which takes seconds."""
    monkeypatch.setattr(module, "_compare", lambda *arguments: (0.0, 0.0))


# --- dense ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "dtype"), [("llama", torch.bfloat16), ("gpt2", torch.float32)])
def test_dense_is_a_plain_checkpoint_of_the_dequantized_weights(tmp_path, unchecked, architecture, dtype):
    model = make_model(architecture, dtype=dtype, tie_word_embeddings=True)
    save_compressed(
        tmp_path / "packed", model, embedding=IntegerCoding(8, 32), ordered=True, tokenizer=byte_tokenizer()
    )
    result = export(tmp_path / "packed", "dense", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert dense.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        assert torch.equal(dense.state_dict()[name], tensor.bfloat16()), name
    assert not hasattr(dense.config, "quantization_config")
    assert result.bytes_after > result.bytes_before
    assert any("grew" in note for note in result.notes)
    text = "def f(x): return x"
    assert AutoTokenizer.from_pretrained(tmp_path / "dense")(text) == byte_tokenizer()(text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "packed"]


def test_dense_is_compared_in_a_process_without_tailorbird(tmp_path):
    save_compressed(tmp_path / "packed", make_model("llama", dtype=torch.bfloat16))
    result = export(tmp_path / "packed", "dense", tmp_path / "dense")
    assert result.format == "dense"
    assert 0 < result.kl_mean < 1e-3  # not 0: the packed model's weights aren't rounded to 16 bits
    assert 0 < result.max_logit_difference < 0.5


def test_large_results_are_sharded(tmp_path, unchecked, monkeypatch):
    model = save_compressed(tmp_path / "packed", make_model("qwen2"))
    monkeypatch.setattr(module, "SHARD", 20_000)
    export(tmp_path / "packed", "dense", tmp_path / "dense")
    assert len(list((tmp_path / "dense").glob("model-*.safetensors"))) > 3
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        expected = tensor.bfloat16().float() if tensor.ndim > 1 else tensor
        assert torch.equal(dense.state_dict()[name], expected), name


# --- compressed-tensors --------------------------------------------------------------------------


def test_compressed_tensors_loads_every_bit_width(tmp_path):
    pytest.importorskip("compressed_tensors")
    model = make_model("llama", dtype=torch.bfloat16, num_hidden_layers=3)
    coding = some_coding(None, groups=(32, 64, 0, 128))
    save_compressed(tmp_path / "packed", model, coding, embedding=IntegerCoding(4, 32))
    result = export(tmp_path / "packed", "compressed-tensors", tmp_path / "out")
    assert result.kl_mean < 1e-4
    assert any("model.embed_tokens" in note and "16 bits" in note for note in result.notes)
    assert any("blocks of one row" in note for note in result.notes)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    weights = [group["weights"] for group in config["config_groups"].values()]
    assert {(w["num_bits"], w["symmetric"]) for w in weights} == {
        (bits, symmetric) for bits in (2, 3, 4, 5, 6, 8) for symmetric in (True, False)
    }
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as content:
        names = set(content.keys())
    assert "lm_head.weight_packed" in names
    assert "model.embed_tokens.weight" in names


def test_compressed_tensors_refuses_what_it_has_no_place_for(tmp_path, unchecked):
    save_compressed(tmp_path / "ordered", make_model("llama"), ordered=True)
    with pytest.raises(ExportError, match=r"q_proj.*another order"):
        export(tmp_path / "ordered", "compressed-tensors", tmp_path / "out")
    save_compressed(tmp_path / "gpt2", make_model("gpt2"))
    with pytest.raises(ExportError, match="Conv1D"):
        export(tmp_path / "gpt2", "compressed-tensors", tmp_path / "out")
    save_compressed(tmp_path / "nf4", make_model("llama"), CodebookCoding("nf4", 32))
    with pytest.raises(ExportError, match=r"q_proj.*levels of `nf4`"):
        export(tmp_path / "nf4", "compressed-tensors", tmp_path / "out")
    save_compressed(tmp_path / "tables", make_model("llama"), TableCoding(3))
    with pytest.raises(ExportError, match=r"q_proj.*tables of its rows"):
        export(tmp_path / "tables", "compressed-tensors", tmp_path / "out")
    save_compressed(tmp_path / "signs", make_model("llama"), BinaryCoding(32))
    with pytest.raises(ExportError, match=r"q_proj.*magnitudes of its groups"):
        export(tmp_path / "signs", "compressed-tensors", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpt2", "nf4", "ordered", "signs", "tables"]


@pytest.mark.parametrize("coding", [CodebookCoding("nf4", 32), TableCoding(4), BinaryCoding(32)])
def test_codebooks_and_tables_are_exported_dense(tmp_path, unchecked, coding):
    model = save_compressed(tmp_path / "packed", make_model("llama"), coding, tokenizer=byte_tokenizer())
    export(tmp_path / "packed", "dense", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(dense.state_dict()[name], tensor, rtol=2.0**-8, atol=0)


def test_a_head_that_does_not_fit_becomes_dense(tmp_path, unchecked):
    def coding(name):
        return IntegerCoding(4, 32, symmetric=True)

    save_compressed(tmp_path / "packed", make_model("llama"), coding)
    config = tmp_path / "packed" / "config.json"
    data = json.loads(config.read_text())
    stated = data["quantization_config"]["modules"]["lm_head"]
    stated["order"] = True
    config.write_text(json.dumps(data))
    from safetensors.torch import load_file

    from tailorbird.model.checkpoint import write_tensors

    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    tensors["lm_head.order"] = torch.randperm(64).int()
    write_tensors(tmp_path / "packed" / "model.safetensors", tensors)
    result = export(tmp_path / "packed", "compressed-tensors", tmp_path / "out")
    assert any("lm_head" in note and "another order" in note for note in result.notes)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as content:
        assert torch.equal(
            content.get_tensor("lm_head.weight").float(),
            load(tmp_path / "packed").lm_head.weight.bfloat16().float(),
        )


# --- gguf ----------------------------------------------------------------------------------------


def test_gguf_is_read_by_transformers_as_the_same_model(tmp_path):
    """q and k rows, head counts, rotary base, norms and biases: a wrong one shows in the logits."""
    pytest.importorskip("gguf")
    gguf_model(
        tmp_path / "packed", attention_bias=False, rope_parameters={"rope_type": "default", "rope_theta": 5e4}
    )
    result = export(tmp_path / "packed", "gguf", tmp_path / "model.gguf")
    assert result.kl_mean == 0
    assert result.max_logit_difference == 0
    # The file alone, without config.json, states the same model.
    alone = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert torch.equal(alone(ids).logits, load(tmp_path / "packed", dtype=torch.float32)(ids).logits)
    assert any("2-bit weights are stored as Q4_0" in note for note in result.notes)


@pytest.mark.full
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama3"])
def test_gguf_of_other_architectures_is_read_by_transformers(tmp_path, architecture):
    changes = {"rope_parameters": LLAMA3_ROPE} if architecture == "llama3" else {}
    architecture = architecture.replace("llama3", "llama")
    gguf_model(tmp_path / "packed", architecture, trained_tokenizer("qwen2"), **changes)
    assert export(tmp_path / "packed", "gguf", tmp_path / "model.gguf").max_logit_difference == 0


@pytest.mark.parametrize(
    ("architecture", "pre", "changes"),
    [
        ("llama", "llama-bpe", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
        ("qwen2", "qwen2", {"tie_word_embeddings": True}),
        ("qwen3", "gpt-2", {}),
    ],
)
def test_gguf_tensors_and_metadata(tmp_path, architecture, pre, changes):
    gguf = pytest.importorskip("gguf")
    gguf_model(tmp_path / "packed", architecture, trained_tokenizer(pre), **changes)
    stored = StoredModel.open(tmp_path / "packed")
    path = tmp_path / "model.gguf"
    gguf_file.write(stored, path)
    gguf_file.verify(stored, path)
    reader = gguf.GGUFReader(path)
    names = {tensor.name for tensor in reader.tensors}
    assert ("output.weight" in names) == (not stored.anatomy.tied)
    assert "blk.1.ffn_down.weight" in names
    expected = {
        "general.architecture": architecture,
        f"{architecture}.block_count": 2,
        f"{architecture}.attention.head_count": 4,
        f"{architecture}.attention.head_count_kv": 2,
        f"{architecture}.embedding_length": 64,
        f"{architecture}.feed_forward_length": 160,
        f"{architecture}.context_length": 128,
        f"{architecture}.rope.dimension_count": 16,
        f"{architecture}.vocab_size": 330,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }
    for key, value in expected.items():
        assert reader.fields[key].contents() == value, key
    assert math.isclose(
        reader.fields[f"{architecture}.attention.layer_norm_rms_epsilon"].contents(), 1e-6, rel_tol=1e-3
    )
    original = AutoTokenizer.from_pretrained(tmp_path / "packed")
    assert_same_ids(original, rebuilt_tokenizer(reader), TEXT.splitlines()[:4])


def rebuilt_tokenizer(reader):
    """A tokenizer made from nothing but the metadata of a GGUF file."""
    field = {
        name: value.contents() for name, value in reader.fields.items() if name.startswith("tokenizer.ggml")
    }
    tokens, types = field["tokenizer.ggml.tokens"], field["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in field["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != 5}
    pre = field["tokenizer.ggml.pre"]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = splitter(pre)
    tokenizer.add_special_tokens([token for token, kind in zip(tokens, types, strict=True) if kind == 3])
    return tokenizer


def assert_same_ids(original, rebuilt, lines):
    for line in lines:
        assert (
            rebuilt.encode(line, add_special_tokens=False).ids
            == original(line, add_special_tokens=False).input_ids
        )


def test_gguf_of_a_trained_model_keeps_its_tokenizer(tmp_path, assets, unchecked, request):
    gguf = pytest.importorskip("gguf")
    source = assets / "models" / "python-7m"
    model = AutoModelForCausalLM.from_pretrained(source)
    save_compressed(
        tmp_path / "packed",
        model,
        some_coding(True, "float16"),
        embedding=IntegerCoding(4, 32, True, "float16"),
        tokenizer=AutoTokenizer.from_pretrained(source),
    )
    export(tmp_path / "packed", "gguf", tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    lines = (assets / "data" / "python-heldout" / "heldout.txt").read_text().splitlines()
    lines += (assets / "data" / "wikitext-2" / "test.raw.txt").read_text().splitlines()
    chosen = [line for line in lines if line][:: len(lines) // 1500][:1000]
    assert len(chosen) == 1000
    assert_same_ids(AutoTokenizer.from_pretrained(source), rebuilt_tokenizer(reader), chosen)


def test_rotary_scaling_of_llama3_is_written_as_factors(tmp_path):
    gguf = pytest.importorskip("gguf")
    gguf_model(tmp_path / "packed", rope_parameters=LLAMA3_ROPE)
    stored = StoredModel.open(tmp_path / "packed")
    gguf_file.write(stored, tmp_path / "model.gguf")
    gguf_file.verify(stored, tmp_path / "model.gguf")
    found = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}["rope_freqs.weight"]
    for i, factor in enumerate(found):  # the formula of the Llama 3.1 model card
        wavelength = 2 * math.pi * 1e4 ** (2 * i / 16)
        smooth = (32 / wavelength - 1.0) / (4.0 - 1.0)
        expected = 8.0 if wavelength > 32 else 1.0 if wavelength < 8 else 1 / ((1 - smooth) / 8 + smooth)
        assert math.isclose(factor, expected, rel_tol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "changes", "named"),
    [
        ("mistral", {}, "mistral"),
        ("gpt2", {}, "gpt2"),
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding"),
    ],
)
def test_architectures_that_llama_cpp_runs_otherwise_are_refused(tmp_path, architecture, changes, named):
    make_model(architecture, **changes).save_pretrained(tmp_path)
    with pytest.raises(ExportError, match=named):
        check_gguf_architecture(open_checkpoint(str(tmp_path)))


@pytest.mark.parametrize(
    ("coding", "named"),
    [
        (IntegerCoding(4, 32), r"layers\.0\.self_attn\.q_proj.*zero points"),
        (IntegerCoding(4, 32, True), r"layers\.0\.self_attn\.q_proj.*bfloat16"),
        (TableCoding(4, "float16"), r"layers\.0\.self_attn\.q_proj.*tables of its rows"),
        (BinaryCoding(32, "float16"), r"layers\.0\.self_attn\.q_proj.*magnitudes of its groups"),
        (CodebookCoding("nf4", 32, "float16"), r"layers\.0\.self_attn\.q_proj.*levels of `nf4`"),
    ],
)
def test_codings_without_a_block_type_are_refused_by_name(tmp_path, coding, named):
    gguf_model(tmp_path / "packed", coding=lambda name: coding)
    with pytest.raises(ExportError, match=named):
        export(tmp_path / "packed", "gguf", tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda t: t["model"].update(byte_fallback=True), "byte_fallback"),
        (lambda t: t["model"].update(ignore_merges=True), "ignore_merges"),
        (lambda t: t["model"].update(type="Unigram"), "Unigram"),
        (lambda t: t.update(normalizer={"type": "Lowercase"}), "Lowercase"),
        (lambda t: t["pre_tokenizer"].update(add_prefix_space=True), "ByteLevel"),
        (lambda t: t["pre_tokenizer"].update(use_regex=False), "ByteLevel"),
        (lambda t: t.update(pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
        (lambda t: t.update(pre_tokenizer=None), "splits text"),
    ],
)
def test_tokenizers_that_llama_cpp_runs_otherwise_are_refused(edit, named):
    pytest.importorskip("gguf")
    data = json.loads(trained_tokenizer().backend_tokenizer.to_str())
    gguf_file.read_vocabulary(data, 400)
    edit(data)
    with pytest.raises(ExportError, match=named):
        gguf_file.read_vocabulary(data, 400)


def test_a_token_beyond_the_embedding_is_refused():
    pytest.importorskip("gguf")
    data = json.loads(trained_tokenizer().backend_tokenizer.to_str())
    with pytest.raises(CheckpointError, match="ids below 300"):
        gguf_file.read_vocabulary(data, 300)


# --- refusals and files --------------------------------------------------------------------------


def test_mistakes_are_named_and_leave_nothing(tmp_path, monkeypatch):
    packed = tmp_path / "packed"
    save_compressed(packed, make_model("llama"), blocks={})
    make_model("llama").save_pretrained(tmp_path / "plain")
    with pytest.raises(SettingsError, match="did you mean `gguf`"):
        export(packed, "ggufs", tmp_path / "out")
    with pytest.raises(SettingsError, match="exists"):
        export(packed, "dense", tmp_path / "plain")
    with pytest.raises(ExportError, match="not compressed"):
        export(tmp_path / "plain", "dense", tmp_path / "out")
    (tmp_path / "out.partial" / ".job").mkdir(parents=True)
    with pytest.raises(SettingsError, match="unfinished work of another command"):
        export(packed, "dense", tmp_path / "out")
    assert (tmp_path / "out.partial" / ".job").exists()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"`gguf` isn't installed.*tailorbird\[bench\]"):
        export(packed, "gguf", tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial", "packed", "plain"]


def test_what_a_killed_export_left_is_replaced(tmp_path, unchecked):
    save_compressed(tmp_path / "packed", make_model("llama"))
    left = tmp_path / "out.partial"
    left.mkdir()
    (left / module.MARK).touch()
    (left / "stale.safetensors").touch()
    export(tmp_path / "packed", "dense", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors"}
    assert not left.exists()


def test_unverified_bytes_are_mentioned(tmp_path, unchecked):
    save_compressed(tmp_path / "packed", make_model("llama"))
    load(tmp_path / "packed").save_pretrained(tmp_path / "saved")
    for name, mentioned in (("packed", False), ("saved", True)):
        result = export(tmp_path / name, "dense", tmp_path / f"{name}-dense")
        assert any("no hashes" in note for note in result.notes) == mentioned


def test_a_damaged_body_is_not_exported(tmp_path):
    save_compressed(tmp_path / "packed", make_model("llama"))
    path = tmp_path / "packed" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-50] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="changed after it was written"):
        export(tmp_path / "packed", "dense", tmp_path / "out")


def test_shapes_of_its_own_are_refused(tmp_path):
    save_compressed(tmp_path / "heads", make_model("llama"), blocks={1: BlockLayout(num_attention_heads=4)})
    with pytest.raises(ExportError, match="block 1"):
        export(tmp_path / "heads", "dense", tmp_path / "out")
    model = make_model("llama")
    mlp = model.model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj = torch.nn.Linear(64, 96, False), torch.nn.Linear(64, 96, False)
    mlp.down_proj = torch.nn.Linear(96, 64, False)
    save_compressed(tmp_path / "width", model)
    with pytest.raises(ExportError, match=r"layers\.1\.mlp\.gate_proj.*\[96, 64\]"):
        export(tmp_path / "width", "dense", tmp_path / "out")


def test_an_export_that_differs_is_removed(tmp_path, monkeypatch):
    save_compressed(tmp_path / "packed", make_model("llama"))

    def other(source, exported, to, ids, scratch):
        return torch.randn(*ids.shape, 258)

    monkeypatch.setattr(module, "_reopen", other)
    with pytest.raises(ExportError, match="differs from the packed one by a KL"):
        export(tmp_path / "packed", "dense", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


@pytest.mark.full
def test_an_export_without_a_tensor_is_noticed_in_the_fresh_process(tmp_path, monkeypatch):
    save_compressed(tmp_path / "packed", make_model("llama"))
    monkeypatch.setattr(module, "_other_piece", lambda model, name, dtype: module.Piece(name, 0, dict))
    with pytest.raises(ExportError, match=r"missing.*norm"):
        export(tmp_path / "packed", "dense", tmp_path / "out")
