"""Pages: against a slow model that keeps sets, under random use."""

from __future__ import annotations

import random

import pytest

from tailorbird.serve.page_pool import PagePool, prefix_key


def test_keys_stand_for_all_tokens_before_and_for_the_salt() -> None:
    a, b = prefix_key(b"me", [1, 2]), prefix_key(b"you", [1, 2])
    assert a != b
    assert prefix_key(a, [3]) != prefix_key(b, [3])
    assert prefix_key(a, [3]) == prefix_key(prefix_key(b"me", [1, 2]), [3])
    assert prefix_key(b"", [1, 2]) != prefix_key(b"", [2, 1])


def test_taking_more_than_there_is_takes_nothing() -> None:
    pool = PagePool(3)
    held = pool.take(2)
    assert held is not None
    assert pool.take(2) is None
    assert pool.available == 1
    pool.release(held)
    assert pool.available == 3


def test_pages_that_nobody_uses_are_found_until_their_room_is_needed() -> None:
    pool = PagePool(3)
    pages = pool.take(3)
    assert pages is not None
    for page, key in zip(pages, (b"a", b"b", b"c"), strict=True):
        pool.publish(page, key)
    pool.release(pages)
    assert pool.used == 0
    found = pool.find([b"a", b"b"])
    assert found == pages[:2]
    pool.release(found)
    one = pool.take(1)  # c was let go longest ago
    assert one == [pages[2]]
    assert pool.find([b"a", b"b", b"c"]) == pages[:2]


def test_pages_that_were_never_taken_are_lent_first() -> None:
    pool = PagePool(4)
    taken = pool.take(2)
    assert taken is not None
    pool.publish(taken[0], b"a")
    pool.release(taken)
    lent = pool.lend(2)
    assert lent is not None
    assert not set(lent) & set(taken)
    assert pool.lend(3) is None
    assert pool.lend(2) is not None
    assert pool.find([b"a"]) == []


def test_a_user_too_few_is_an_error() -> None:
    pool = PagePool(1)
    for wrong in (pool.release, pool.share):
        with pytest.raises(ValueError, match="nobody uses it"):
            wrong([0])


@pytest.mark.parametrize("seed", range(20))
def test_random_use_never_loses_or_doubles_a_page(seed: int) -> None:
    rng, pool = random.Random(seed), PagePool(12)
    holders: list[list[int]] = []
    content: dict[int, bytes] = {}  # what was last published for a page, which `find` must return only if so
    lent: list[int] = []
    for _ in range(600):
        kind = rng.randrange(7)
        if kind == 0:
            count = rng.randrange(5)
            before = pool.available
            taken = pool.take(count)
            assert (taken is None) == (count > before)
            if taken:
                assert not {page for held in holders for page in held} & set(taken)
                for page in taken:
                    content.pop(page, None)
                holders.append(taken)
        elif kind == 1 and holders:
            pool.release(holders.pop(rng.randrange(len(holders))))
        elif kind == 2 and holders:
            held = rng.choice(holders)
            pool.share(held)
            holders.append(list(held))
        elif kind == 3 and holders:
            page, key = rng.choice(rng.choice(holders)), bytes([rng.randrange(20)])
            if page not in content and key not in content.values():
                content[page] = key
            pool.publish(page, key)
        elif kind == 4:
            count = rng.randrange(4)
            borrowed = pool.lend(count) if count <= pool.available else []
            assert borrowed is not None
            for page in borrowed:
                content.pop(page, None)
            lent += borrowed
        elif kind == 5:
            kept = rng.randrange(len(lent) + 1)
            pool.take_back(lent[kept:])
            del lent[kept:]
        else:
            keys = [bytes([rng.randrange(20)]) for _ in range(3)]
            found = pool.find(keys)
            for page, key in zip(found, keys, strict=False):
                assert content[page] == key
            if found:
                holders.append(found)
        in_use = {page for held in holders for page in held}
        assert pool.used == len(in_use)
        assert pool.lent == len(set(lent)) == len(lent)
        assert not in_use & set(lent)
        assert pool.available == 12 - len(in_use) - len(lent)
    pool.take_back(lent)
    for held in holders:
        pool.release(held)
    assert pool.available == 12
    everything = pool.take(12)
    assert everything is not None
    assert sorted(everything) == list(range(12))
