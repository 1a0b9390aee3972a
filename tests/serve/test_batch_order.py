"""The order of many requests: nothing is lost, beginnings stay together, reading and writing mix."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tailorbird.serve.batch_order import CHUNK, Weight, blended

texts = st.lists(st.sampled_from(["a", "b", "c"]), max_size=4).map(
    lambda parts: "".join(p * CHUNK for p in parts)
)
weights = st.builds(Weight, st.builds(str.__add__, texts, st.text("xyz", max_size=9)), st.integers(1, 500))


@given(st.lists(weights, max_size=30))
def test_every_request_comes_once(requests: list[Weight]) -> None:
    assert sorted(blended(requests)) == list(range(len(requests)))


def test_those_that_begin_alike_follow_each_other() -> None:
    openings = [letter * (3 * CHUNK) for letter in "abcd"]
    requests = [Weight(openings[number % 4] + str(number), 10) for number in range(40)]
    order = blended(requests)
    # Two scanners: at any time at most two beginnings are under way.
    seen = [requests[number].text[0] for number in order]
    for letter in "abcd":
        places = [at for at, found in enumerate(seen) if found == letter]
        assert places[-1] - places[0] < 25


def test_every_stretch_reads_and_writes_in_about_the_proportion_of_all() -> None:
    reading = [Weight(f"{number:04}" + "r" * 4000, 10) for number in range(20)]
    writing = [Weight(f"w{number:04}", 400) for number in range(20)]
    requests = reading + writing
    order = blended(requests)
    total = sum(len(r.text) for r in requests) / sum(r.writes for r in requests)
    for at in range(0, 40, 8):
        part = [requests[number] for number in order[at : at + 8]]
        here = sum(len(r.text) for r in part) / sum(r.writes for r in part)
        assert total / 2.5 < here < total * 2.5


def test_texts_may_have_very_much_in_common() -> None:
    long = "x" * (2000 * CHUNK)
    requests = [Weight(long + end, 1) for end in ("", "a" * CHUNK, "b")]
    assert sorted(blended(requests)) == [0, 1, 2]
