"""Windows hold the text's own tokens, in order or drawn by seed, and say when a text is of no use."""

from __future__ import annotations

import itertools

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tailorbird.calibrate import text as module
from tailorbird.calibrate.text import Document, Windows, held_out_windows, token_windows
from tailorbird.errors import SettingsError, TextError
from tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id


def begin_tokenizer():
    """The byte tokenizer, made to begin every text with `<s>` as many models' do."""
    tokenizer = byte_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def word_tokenizer():
    """Knows `a` and `b`, has no begin or end token, and gives everything else one unknown token."""
    tokenizer = Tokenizer(models.WordLevel({"[unk]": 0, "a": 1, "b": 2}, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[unk]")


def documents(count, size=100):
    """Documents whose every byte tells the document: (the letter's number is the document's)."""
    return [Document(chr(33 + i) * size, f"f, line {i + 1}") for i in range(count)]


def decode(ids):
    return TOKENIZER.decode(ids)


def test_held_out_windows_are_the_text_in_order():
    windows = held_out_windows(documents(5, 10), TOKENIZER, 6)
    joined = [
        token for i in range(5) for token in ([END] if i else []) + TOKENIZER(chr(33 + i) * 10).input_ids
    ]
    assert windows.ids.flatten().tolist() == joined[: len(joined) // 6 * 6]
    assert windows.ids.dtype == torch.int64
    assert windows.tokens == windows.ids.numel() == 54
    assert windows.documents == 5
    assert windows.source == "f"


@pytest.mark.parametrize(("most", "rows"), [(12, 2), (17, 2), (18, 3), (4, 1)])
def test_no_more_than_the_stated_tokens_are_held_out(most, rows):
    windows = held_out_windows(documents(5, 10), TOKENIZER, 6, max_tokens=most)
    assert windows.ids.shape == (rows, min(6, most))
    everything = held_out_windows(documents(5, 10), TOKENIZER, min(6, most)).ids.tolist()
    places = [everything.index(row) for row in windows.ids.tolist()]
    assert places == sorted(set(places))


@pytest.mark.parametrize(("windows", "most"), [(40, 40), (41, 40), (79, 40), (1000, 40), (1000, 1), (7, 3)])
def test_held_out_windows_are_spread_evenly(windows, most):
    text = "".join(f"{i:07}\n" for i in range(windows))
    found = held_out_windows([Document(text, "f")], TOKENIZER, 8, max_tokens=8 * most)
    numbers = [int(decode(row)) for row in found.ids]
    assert len(numbers) == most
    steps = [b - a for a, b in itertools.pairwise(numbers)]
    assert max(steps, default=0) - min(steps, default=0) <= 1
    before, after = numbers[0], windows - 1 - numbers[-1]
    assert abs(before - after) <= 1
    assert before + after <= windows / most
    again = held_out_windows([Document(text, "f")], TOKENIZER, 8, max_tokens=8 * most)
    assert again.fingerprint == found.fingerprint


def test_only_what_is_needed_is_encoded(monkeypatch):
    encoded = []
    original = module._Encoder.encode
    monkeypatch.setattr(module, "LARGEST_PIECE", 1000)
    monkeypatch.setattr(
        module._Encoder, "encode", lambda self, texts: encoded.extend(texts) or original(self, texts)
    )
    many = documents(90, 500)
    windows = held_out_windows(many, TOKENIZER, 64, max_tokens=192)
    assert 64 * 192 <= sum(map(len, encoded)) <= 64 * 192 + 2000
    assert windows.ids.shape == (3, 64)
    assert decode(windows.ids[2])[-1] > many[20].text[0]
    encoded.clear()
    token_windows(many, TOKENIZER, 64, count=16)
    assert 4 * 1024 <= sum(map(len, encoded)) <= 4 * 1024 + 2000


def test_a_text_cut_into_parts_or_pieces_gives_the_tokens_of_the_whole(monkeypatch):
    whole = "".join(f"line {i}\n" for i in range(500))
    expected = held_out_windows([Document(whole, "f")], TOKENIZER, 32, 10**6)
    parts = [Document(whole[i : i + 300], "f", i // 300) for i in range(0, len(whole), 300)]
    assert torch.equal(held_out_windows(parts, TOKENIZER, 32, 10**6).ids, expected.ids)
    monkeypatch.setattr(module, "LARGEST_PIECE", 50)
    assert torch.equal(held_out_windows([Document(whole, "f")], TOKENIZER, 32, 10**6).ids, expected.ids)
    spaceless = Document("x" * 333 + "yz" * 50, "f")
    assert "".join(piece.text for piece in module._pieces([spaceless])) == spaceless.text


def test_parts_that_do_not_follow_each_other_are_kept_apart():
    windows = held_out_windows([Document("aa", "f", 0), Document("bb", "f", 2)], TOKENIZER, 5)
    assert decode(windows.ids[0]) == "aa</s>bb"


def test_a_begin_token_stands_where_the_tokenizer_would_set_it():
    tokenizer = begin_tokenizer()
    begin = tokenizer.bos_token_id
    windows = held_out_windows(documents(4, 10), tokenizer, 7)
    assert (windows.ids[:, 0] == begin).all()
    rest = [token for token in windows.ids.flatten().tolist() if token != begin]
    whole = [token for d in documents(4, 10) for token in TOKENIZER(d.text).input_ids]
    assert rest == whole[: len(rest)]
    assert (windows.ids[:, :-1] == begin).logical_and(windows.ids[:, 1:] == begin).sum() == 0
    assert (token_windows(documents(4, 10), tokenizer, 7).ids[:, 0] == begin).all()
    assert (held_out_windows(documents(4, 10), TOKENIZER, 7).ids != begin).all()


def test_without_special_tokens_documents_are_just_joined():
    tokenizer = word_tokenizer()
    windows = held_out_windows([Document("a b", "f, line 1"), Document("b a", "f, line 2")], tokenizer, 4)
    assert windows.ids.tolist() == [[1, 2, 2, 1]]


def test_drawn_windows_are_windows_of_the_text_each_at_most_once():
    everything = token_windows(documents(40), TOKENIZER, 16)
    rows = {tuple(row) for row in everything.ids.tolist()}
    numbered = [Document(" ".join(f"{i}.{j}" for j in range(60)), f"f, line {i + 1}") for i in range(40)]
    whole = held_out_windows(numbered, TOKENIZER, 16, 10**6)
    drawn = token_windows(numbered, TOKENIZER, 16, count=50, seed=3)
    assert drawn.ids.shape == (50, 16)
    assert len({tuple(row) for row in drawn.ids.tolist()}) == 50
    texts = "\n".join(d.text for d in numbered)
    for row in drawn.ids.tolist():
        for stretch in decode(row).split("</s>"):
            assert stretch in texts
    assert len(whole.ids) > 500
    assert len(rows) > 1


def test_windows_are_spread_over_the_text():
    windows = token_windows(documents(90, 64), TOKENIZER, 16, count=90)
    assert windows.documents > 60
    few = token_windows(documents(90, 64), TOKENIZER, 16, count=4)
    assert few.documents <= len({token for row in few.ids.tolist() for token in row}) <= 8


def test_the_seed_decides_and_nothing_else():
    numbered = [Document(" ".join(f"{i}.{j}" for j in range(60)), f"f, line {i + 1}") for i in range(80)]
    first, again = (token_windows(numbered, TOKENIZER, 16, 20, seed=1) for _ in range(2))
    assert torch.equal(first.ids, again.ids)
    assert first.fingerprint == again.fingerprint
    other = token_windows(numbered, TOKENIZER, 16, 20, seed=2)
    assert other.fingerprint != first.fingerprint


def test_fewer_windows_than_asked_for_are_all_of_them():
    windows = token_windows(documents(3), TOKENIZER, 16, count=1000)
    assert len(windows.ids) == (3 * 100 + 2) // 16
    in_order = held_out_windows(documents(3), TOKENIZER, 16)
    assert sorted(windows.ids.tolist()) == sorted(in_order.ids.tolist())


@pytest.mark.parametrize("cut", [token_windows, held_out_windows])
def test_too_little_text_gives_one_shorter_window(cut):
    windows = cut([Document("abc", "f")], TOKENIZER, 64)
    assert decode(windows.ids[0]) == "abc"
    assert windows.ids.shape == (1, 3)


@pytest.mark.parametrize("cut", [token_windows, held_out_windows])
@pytest.mark.parametrize("given", ["z", "zzzzzz", ""])
def test_text_that_is_one_token_is_refused(cut, given):
    with pytest.raises(TextError, match="one token" if given else "no tokens"):
        cut([Document(given, "f"), Document(given, "g")], TOKENIZER, 4)


def test_text_that_is_all_unknown_is_refused_and_much_unknown_is_told():
    with pytest.raises(TextError, match="one token 0"):
        token_windows([Document("x y z", "f")], word_tokenizer(), 2)
    much = token_windows([Document("a b x a b y a z", "f")], word_tokenizer(), 2)
    assert len(much.warnings) == 1
    assert "38 %" in much.warnings[0]
    assert token_windows([Document("a b a b a b a b x", "f")], word_tokenizer(), 2).warnings == ()


def test_windows_of_one_token_are_refused():
    with pytest.raises(SettingsError, match="2 tokens or more"):
        token_windows(documents(2), TOKENIZER, 1)


def test_halves_share_no_window_and_lose_none():
    windows = token_windows(documents(60), TOKENIZER, 16, count=51)
    one, two = windows.halves()
    assert torch.equal(torch.cat([one.ids, two.ids]), windows.ids)
    assert abs(len(one.ids) - len(two.ids)) <= 1
    assert 0 < one.documents <= windows.documents
    assert one.fingerprint != two.fingerprint
    with pytest.raises(TextError, match="single window"):
        Windows.from_ids(torch.arange(8)[None], "sampled").halves()


def test_a_fingerprint_tells_shapes_and_orders_apart():
    ids = torch.arange(12)
    prints = {
        Windows.from_ids(ids.reshape(shape), "s").fingerprint for shape in [(3, 4), (4, 3), (2, 6), (12, 1)]
    }
    prints.add(Windows.from_ids(ids.flip(0).reshape(3, 4), "s").fingerprint)
    assert len(prints) == 5
    same = Windows.from_ids(ids.reshape(3, 4).to(torch.int32), "other")
    assert same.fingerprint in prints


def test_real_tokenizers_give_readable_windows(assets):
    from transformers import AutoTokenizer

    for name, begins in [("python-7m", False), ("stories260k", True)]:
        tokenizer = AutoTokenizer.from_pretrained(assets / "models" / name)
        found = module.read_documents(assets / "data" / "python-heldout" / "heldout.txt", tokenizer)[:40]
        windows = held_out_windows(found, tokenizer, 128, 2048)
        assert windows.ids.shape == (16, 128)
        everything = held_out_windows(found, tokenizer, 128, 10**6).ids
        assert len(everything) > 100
        whole = tokenizer("".join(d.text for d in found), add_special_tokens=False, verbose=False).input_ids
        assert everything[:, begins:].flatten().tolist()[:400] == whole[:400]
        places = [everything.tolist().index(row) for row in windows.ids.tolist()]
        assert places == sorted(places)
        assert places[0] < len(everything) / 16
        assert places[-1] > len(everything) * 15 / 16
        assert (windows.ids[:, 0] == tokenizer.bos_token_id).all() == begins
