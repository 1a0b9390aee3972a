"""The compiled products in any threads and forked processes: always the bits that one thread gives alone."""

from __future__ import annotations

import multiprocessing
import os
import threading

import pytest
import torch

from forked import LONGEST_SECONDS, true_in_child
from packed_weights import laid_out, random_packed
from tailorbird.formats.packed import IntegerCoding
from tailorbird.kernels import native

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler"),
    pytest.mark.usefixtures("two_threads"),
]

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system doesn't fork")
#: Large enough for more than one thread.
SHAPE = 515, 1030


def layout_of(bits: int, shape: tuple[int, int] = SHAPE) -> native.Tiles:
    return laid_out(native.tiles, random_packed(IntegerCoding(bits, 32), shape))


def activations(rows: int, columns: int = SHAPE[1]) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


def alone(x: torch.Tensor, layout: native.Tiles, int8: bool) -> torch.Tensor:
    """The product by one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    product = native.linear(x, layout, int8)
    torch.set_num_threads(before)
    return product


@forks
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("threads_before", [1, 2])
@pytest.mark.parametrize("threads_after", [1, 2, 3])
def test_a_forked_child_goes_on(int8: bool, threads_before: int, threads_after: int) -> None:
    layout, x = layout_of(4), activations(20)
    torch.set_num_threads(threads_before)
    expected = native.linear(x, layout, int8)

    def work() -> bool:
        torch.set_num_threads(threads_after)
        products = [native.linear(x, layout, int8) for _ in range(3)]
        return all(torch.equal(product, expected) for product in products)

    assert true_in_child(work)
    assert torch.equal(native.linear(x, layout, int8), expected)


@forks
def test_a_forked_child_lays_weights_out() -> None:
    packed = random_packed(IntegerCoding(3, 32), SHAPE)
    expected = laid_out(native.tiles, packed)

    def work() -> bool:
        return torch.equal(laid_out(native.tiles, packed).codes, expected.codes)

    assert true_in_child(work)


@forks
def test_children_of_children_and_threads_of_children_go_on() -> None:
    layout, x = layout_of(4), activations(20)
    expected = native.linear(x, layout, True)

    def right() -> bool:
        return torch.equal(native.linear(x, layout, True), expected)

    def by_a_thread() -> bool:
        found: list[bool] = []
        thread = threading.Thread(target=lambda: found.append(right() and true_in_child(right) and right()))
        thread.start()
        thread.join()
        return found == [True]

    def work() -> bool:
        return right() and true_in_child(right) and by_a_thread() and right()

    assert true_in_child(work)
    assert by_a_thread()


@forks
def test_a_process_forks_while_its_threads_multiply() -> None:
    layout, x = layout_of(4), activations(20)
    expected = native.linear(x, layout, True)
    found: list[bool] = []
    ended = threading.Event()

    def right() -> bool:
        return torch.equal(native.linear(x, layout, True), expected)

    def work() -> None:
        while not ended.is_set():
            found.append(right())

    callers = [threading.Thread(target=work) for _ in range(2)]
    for caller in callers:
        caller.start()
    children = [true_in_child(right) for _ in range(10)]
    ended.set()
    for caller in callers:
        caller.join()
    assert all(children)
    assert found
    assert all(found)


def _sum_of_product(x: torch.Tensor) -> list[float]:
    return native.linear(x, layout_of(4), True).double().sum(1).tolist()


@forks
def test_a_pool_of_forked_workers_gives_the_same_bits() -> None:
    inputs = [activations(rows) for rows in (5, 13, 20)]
    expected = [_sum_of_product(x) for x in inputs]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map_async(_sum_of_product, inputs, chunksize=1).get(timeout=LONGEST_SECONDS)
    assert found == expected


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_more_threads_than_cores_or_tiles_change_no_bit(int8: bool, rows: int) -> None:
    for shape in (SHAPE, (3000, 160), (33, 9000)):
        layout, x = layout_of(5, shape), activations(rows, shape[1])
        expected = alone(x, layout, int8)
        for count in (8, 17):
            torch.set_num_threads(count)
            assert torch.equal(native.linear(x, layout, int8), expected)


@pytest.mark.parametrize("int8", [False, True])
def test_calls_at_the_same_time_give_the_bits_of_calls_alone(int8: bool) -> None:
    """Threads of unlike weights and numbers of tokens, so that none keeps room that suits the others."""
    cases = [
        (layout_of(bits, shape), activations(rows, shape[1]))
        for bits, shape, rows in ((2, SHAPE, 40), (4, (130, 2100), 3), (6, (70, 5000), 13), (8, SHAPE, 25))
    ]
    expected = [alone(x, layout, int8) for layout, x in cases]
    found: list[bool] = []

    def work(first: int) -> None:
        for turn in range(40):
            layout, x = cases[(first + turn) % len(cases)]
            product = native.linear(x, layout, int8)
            found.append(torch.equal(product, expected[(first + turn) % len(cases)]))

    callers = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 160
    assert all(found)
