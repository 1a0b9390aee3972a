"""Statistics are the moments that the formulas name, and the same bits however tokens arrive."""

from __future__ import annotations

import itertools

import pytest
import torch

from tailorbird.calibrate.statistics import CHUNK_TOKENS, PANEL, GramAccumulator, LinearStatistics
from tailorbird.errors import TextError

WIDTH = 13


def inputs(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, WIDTH, generator=generator) * torch.rand(WIDTH, generator=generator) + 0.3
    return x, x + 0.1 * torch.randn(tokens, WIDTH, generator=generator)


def collect(
    x: torch.Tensor, source: torch.Tensor | None, cuts: list[int], dtype: torch.dtype = torch.float32
) -> LinearStatistics:
    accumulator = GramAccumulator(WIDTH, cross=source is not None, dtype=dtype)
    edges = [0, *cuts, len(x)]
    for start, stop in itertools.pairwise(edges):
        accumulator.add(x[start:stop], None if source is None else source[start:stop])
    return accumulator.finish()


@pytest.mark.parametrize("tokens", [1, 7, CHUNK_TOKENS, 3 * CHUNK_TOKENS + 5])
def test_moments_are_those_of_the_formulas(tokens: int) -> None:
    x, source = inputs(tokens)
    found = collect(x, source, [])
    x, source = x.double(), source.double()
    torch.testing.assert_close(found.gram.double(), x.T @ x / tokens, rtol=1e-5, atol=1e-6)
    assert found.cross is not None
    torch.testing.assert_close(found.cross.double(), (source - x).T @ x / tokens, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.mean_abs.double(), x.abs().mean(0), rtol=1e-6, atol=0)
    assert found.max_abs is not None
    assert torch.equal(found.max_abs.double(), x.abs().amax(0))
    assert found.tokens == tokens
    assert found.gram.dtype == found.mean_abs.dtype == torch.float32


def test_batches_do_not_matter_to_the_last_bit() -> None:
    x, source = inputs(3 * CHUNK_TOKENS + 100)
    whole = collect(x, source, [])
    cut = collect(x, source, [1, 2, 500, 513, 1200])
    assert whole.cross is not None
    assert cut.cross is not None
    assert torch.equal(whole.gram, cut.gram)
    assert torch.equal(whole.cross, cut.cross)
    assert torch.equal(whole.mean_abs, cut.mean_abs)
    assert whole.max_abs is not None
    assert cut.max_abs is not None
    assert torch.equal(whole.max_abs, cut.max_abs)


def test_leading_dimensions_are_tokens() -> None:
    x, _ = inputs(24)
    accumulator = GramAccumulator(WIDTH)
    accumulator.add(x.view(2, 3, 4, WIDTH))
    assert torch.equal(accumulator.finish().gram, collect(x, None, []).gram)


def test_inputs_stay_as_they_are_and_may_be_in_sixteen_bits() -> None:
    x, source = (part.bfloat16() for part in inputs(50))
    before = x.clone(), source.clone()
    found = collect(x, source, [])
    assert torch.equal(x, before[0])
    assert torch.equal(source, before[1])
    assert torch.equal(found.gram, collect(x.float(), None, []).gram)


def test_double_sums_are_closer_to_the_exact_moments() -> None:
    generator = torch.Generator().manual_seed(0)
    x = 1000 + torch.randn(40 * CHUNK_TOKENS, WIDTH, generator=generator)
    exact = x.double().T @ x.double() / len(x)
    single = (collect(x, None, []).gram - exact).abs().max()
    double = (collect(x, None, [], torch.float64).gram - exact).abs().max()
    assert double < single


def test_no_cross_where_none_was_asked_for() -> None:
    assert collect(inputs(4)[0], None, []).cross is None


def test_wrong_inputs_are_refused() -> None:
    x, source = inputs(4)
    with pytest.raises(ValueError, match="source_x"):
        GramAccumulator(WIDTH).add(x, source)
    with pytest.raises(ValueError, match="source_x"):
        GramAccumulator(WIDTH, cross=True).add(x)
    with pytest.raises(ValueError, match="inputs"):
        GramAccumulator(WIDTH + 1).add(x)
    with pytest.raises(ValueError, match="inputs"):
        GramAccumulator(WIDTH, cross=True).add(x, source[:2])
    with pytest.raises(TextError):
        GramAccumulator(WIDTH).finish()


def test_a_token_of_weight_two_counts_as_two() -> None:
    x, source = inputs(CHUNK_TOKENS + 9)
    doubled = torch.arange(len(x)) % 3 == 0
    accumulator = GramAccumulator(WIDTH, cross=True, weighted=True)
    weights = torch.where(doubled, 2.0, 1.0)
    weights /= weights.mean()
    for start, stop in itertools.pairwise((0, 5, 300, len(x))):
        accumulator.add(x[start:stop], source[start:stop], weights[start:stop])
    found = accumulator.finish()
    expected = collect(torch.cat([x, x[doubled]]), torch.cat([source, source[doubled]]), [])
    for name in ("gram", "cross", "mean_abs"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="weighted"):
        GramAccumulator(WIDTH, weighted=True).add(x)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_wide_gram_matrix_is_whole_and_symmetric(weighted: bool) -> None:
    width, tokens = 2 * PANEL + 70, CHUNK_TOKENS + 9
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(tokens, generator=torch.Generator().manual_seed(1)) if weighted else None
    accumulator = GramAccumulator(width, weighted=weighted)
    accumulator.add(x, weights=weights)
    gram = accumulator.finish().gram
    double = x.double()
    expected = double.T @ (double if weights is None else double * weights.double()[:, None]) / tokens
    torch.testing.assert_close(gram.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gram, gram.T, rtol=1e-5, atol=1e-6)
