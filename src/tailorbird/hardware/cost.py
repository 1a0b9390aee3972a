"""The cost of work before it is done: operations counted by formula, seconds from measured rates.

Nothing here measures; the rates come in as a `Probe`. A floating-point operation is one addition or one
multiplication, so a product of ``[m, k]`` and ``[k, n]`` takes ``2 m k n`` of them.
"""

from __future__ import annotations

from tailorbird.hardware.probe import Probe


def forward_flops(
    tokens: int, linear_parameters: int, *, layers: int = 0, attention_width: int = 0, context: int = 0
) -> float:
    """Operations of one forward pass.

    Parameters
    ----------
    tokens : int
        Tokens that go in, over all sequences.
    linear_parameters : int
        Weights that each token is multiplied with (linears of all blocks counted in `layers`, and the head
        where it runs).
    layers : int
        Blocks whose attention is counted; 0 leaves attention out.
    attention_width : int
        Query heads times head size.
    context : int
        Keys that each query meets; for whole windows their length, since masked products are computed too.

    Returns
    -------
    float
        Operations.
    """
    scores_and_values = 2 * 2 * context * attention_width * layers
    return float(tokens) * (2 * linear_parameters + scores_and_values)


def gram_flops(tokens: int, in_features: int) -> float:
    """Operations that summing ``x xᵀ`` over `tokens` inputs of a linear takes."""
    return 2.0 * tokens * in_features**2


def gptq_flops(out_features: int, in_features: int) -> float:
    """Operations of second-order rounding of one linear.

    The Gram matrix is factorized, inverted and factorized again (4/3 n³ together), then each column's error
    is spread over the columns after it (2 · out · n²/2). Source: GPTQ, arXiv:2210.17323, section 3.3.
    """
    n = float(in_features)
    return 4 / 3 * n**3 + out_features * n**2


def decode_tokens_per_s(weight_bytes: int, probe: Probe, *, batch: int = 1, fraction: float = 1.0) -> float:
    """Tokens per second of decoding where reading the weights is what takes the time.

    Parameters
    ----------
    weight_bytes : int
        Bytes of weights read per step (embedding rows don't count, a head does).
    probe : Probe
        The machine.
    batch : int
        Sequences that share one reading of the weights.
    fraction : float
        Part of the read bandwidth that the kernels reach, as `speed` measures it (`bandwidth_fraction`).

    Returns
    -------
    float
        Tokens per second over the whole batch.
    """
    return batch * fraction * probe.read_bandwidth / weight_bytes
