"""Generation equals the model read anew at each step, streams whole characters, and refuses nonsense."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tailorbird.errors import CheckpointError, SettingsError
from tailorbird.run.generate import TextStream, choose, generate, sample_text, stop_tokens
from tailorbird.serve.api.text import _byte_letters
from tiny import ARCHITECTURES, byte_tokenizer, make_model

PROMPT = "a prompt longer than windows"


def rebuilt(model: Any, ids: list[int], count: int, pick: Any) -> list[int]:
    """`count` tokens after `ids`, each from one whole pass without a cache."""
    ids = list(ids)
    for step in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[:, -1].float()
        ids.append(pick(logits, step))
    return ids[-count:]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_is_the_argmax_of_a_pass_from_the_start(architecture: str) -> None:
    model, tokenizer = make_model(architecture, seed=1), byte_tokenizer()
    expected = rebuilt(model, tokenizer(PROMPT)["input_ids"], 6, lambda logits, _: int(logits.argmax()))
    assert generate(model, tokenizer, PROMPT, max_tokens=6, stop=()).tokens == expected


def test_sampled_text_is_drawn_from_passes_from_the_start() -> None:
    model, tokenizer = make_model("llama"), byte_tokenizer()
    found = sample_text(model, tokenizer, sequences=5, length=8, seed=7, batch=2)
    draws = torch.rand(5, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    for row in range(5):

        def pick(logits: torch.Tensor, step: int, row: int = row) -> int:
            logits[:, [256, 257]] = -math.inf
            return int(choose(logits, 1.0, draws[row, step + 1 : step + 2]))

        assert found[row].tolist() == [256, *rebuilt(model, [256], 7, pick)]
    assert len({tuple(row) for row in found.tolist()}) == 5


def test_sampled_text_knows_only_ordinary_tokens() -> None:
    """A head wider than the tokenizer (258 with the end at 257), no begin token: all ids are ordinary."""
    model, tokenizer = make_model("llama", vocab_size=400), byte_tokenizer()
    tokenizer.bos_token = None
    found = sample_text(model, tokenizer, sequences=40, length=12, seed=0)
    assert found.shape == (40, 12)
    assert found.dtype == torch.long
    assert int(found.max()) < 257
    assert len(set(found[:, 0].tolist())) > 20


def test_choose_follows_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, -math.inf, 2.0]])
    n = 20_000
    draws = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    for temperature in (0.5, 1.0, 3.0):
        counts = torch.bincount(choose(logits.expand(n, -1), temperature, draws), minlength=4)
        expected = n * torch.softmax(logits[0] / temperature, 0)
        assert (counts - expected).abs().max() <= 1
    assert choose(logits, 1e-300, torch.tensor([0.999], dtype=torch.float64)).item() == 3
    assert choose(logits, 0, torch.tensor([0.0], dtype=torch.float64)).item() == 3


def test_seed_decides() -> None:
    model, tokenizer = make_model("qwen2"), byte_tokenizer()
    texts = [generate(model, tokenizer, "x", 20, temperature=1.0, seed=s, stop=()).tokens for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_stops_before_the_stop_token() -> None:
    model, tokenizer = make_model("llama"), byte_tokenizer()
    free = generate(model, tokenizer, PROMPT, max_tokens=8, stop=()).tokens
    stopped = generate(model, tokenizer, PROMPT, max_tokens=8, stop={free[3]}).tokens
    assert stopped == free[: free.index(free[3])]


def test_all_stated_ends_stop() -> None:
    model, tokenizer = make_model("llama"), byte_tokenizer()
    model.generation_config.eos_token_id = [5, 6]
    model.config.eos_token_id = 7
    assert stop_tokens(model, tokenizer) == {5, 6, 7, 257}


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As sentencepiece makes them: words begin with a lower block, unknown bytes are tokens like <0xE2>."""
    words = ["▁naïve", "▁the", "s"]
    vocabulary = {f"<0x{b:02X}>": b for b in range(256)} | {w: 256 + i for i, w in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TEXT = "naïve 🐦 ‒ 織田 e\u0301 \ufffd end 👩‍👩‍👧 \n\tdone"


@pytest.mark.parametrize(
    ("tokenizer", "tokens"),
    [
        (byte_tokenizer(), byte_tokenizer()(TEXT)["input_ids"]),
        (byte_fallback_tokenizer(), [256, 258, *"🐦 ‒ 織".encode(), 257, 256, *"é".encode(), 257]),
        (byte_fallback_tokenizer(), [257, 65, *"🐦".encode(), *"🐦".encode(), 257]),
    ],
)
def test_streamed_pieces_are_whole_and_join_to_the_text(tokenizer: Any, tokens: list[int]) -> None:
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokens]
    rest = stream.finish()
    whole = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    assert "".join(pieces) + rest == whole
    assert rest == ""
    assert all(not piece.endswith("\ufffd") for piece in pieces)
    assert sum(map(bool, pieces)) > 3, "text comes while it is made, not at the end"


def test_bytes_that_never_become_a_character_are_shown_at_the_end() -> None:
    stream = TextStream(byte_tokenizer())
    half = byte_tokenizer()("ab🐦")["input_ids"][:-2]
    assert [stream.push(token) for token in half] == ["a", "b", "", ""]
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


class Counting:
    """A tokenizer that counts the tokens that it decodes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.decoded = tokenizer, 0

    def decode(self, tokens: list[int], **settings: Any) -> str:
        self.decoded += len(tokens)
        return self.tokenizer.decode(tokens, **settings)


def byte_level_ids(data: list[int]) -> list[int]:
    """Tokens of bytes in `byte_tokenizer`."""
    letters = {byte: letter for letter, byte in _byte_letters().items()}
    ids: list[int] = byte_tokenizer().convert_tokens_to_ids([letters[byte] for byte in data])
    return ids


@pytest.mark.parametrize(
    ("tokenizer", "ids", "word"),
    [(byte_tokenizer(), byte_level_ids, 65), (byte_fallback_tokenizer(), list, 256)],
)
@pytest.mark.parametrize("junk", [[0x80], [0xE2, 0x82], [0xF0, 0x9F, 0x90], [0xFF, 0xC3]])
def test_endless_junk_takes_time_in_proportion_and_shows_as_it_did(
    tokenizer: Any, ids: Any, word: int, junk: list[int]
) -> None:
    tokens = [word, *ids(junk * 400), word]
    counting = Counting(tokenizer)
    stream = TextStream(counting)
    text = "".join(stream.push(token) for token in tokens) + stream.finish()
    assert text == tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    assert counting.decoded < 150 * len(tokens)


def test_streamed_text_is_the_text(assets: Path) -> None:
    from transformers import AutoModelForCausalLM

    directory = assets / "models" / "stories260k"
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    pieces: list[str] = []
    found = generate(model, tokenizer, "Once upon a time", max_tokens=40, on_text=pieces.append)
    assert "".join(pieces) == found.text
    assert found.text == tokenizer.decode(found.tokens, clean_up_tokenization_spaces=False)
    assert len(found.tokens) > 10
    assert len(pieces) > 10
    assert found.seconds > 0
    assert " " in found.text.strip(), "a trained model writes words"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompt": ""}, "at least one token"),
        ({"max_tokens": 0}, "max_tokens 0"),
        ({"max_tokens": 101}, "set max_tokens to 100 or less"),
        ({"prompt": "x" * 128}, "shorten the prompt"),
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"temperature": math.inf}, "temperature inf"),
    ],
)
def test_refuses_by_name(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        generate(make_model("llama"), byte_tokenizer(), **{"prompt": "x" * 28, **settings})


@pytest.mark.parametrize(
    "settings",
    [{"sequences": 0, "length": 4}, {"sequences": 1, "length": 129}, {"sequences": 1, "length": 0}],
)
def test_sampling_refuses_impossible_sizes(settings: dict[str, int]) -> None:
    with pytest.raises(SettingsError):
        sample_text(make_model("llama"), byte_tokenizer(), **settings)


def test_broken_logits_are_an_error_not_a_text() -> None:
    model = make_model("llama")
    model.model.norm.weight.data[3] = math.nan
    with pytest.raises(CheckpointError, match="not finite"):
        generate(model, byte_tokenizer(), "x", max_tokens=2)
