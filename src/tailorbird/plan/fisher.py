"""Sensitivity from gradients: the diagonal of the Fisher information instead of measured divergences.

To second order the KL between a model and its perturbed self is ``½ Δᵀ F Δ``, with ``F`` the Fisher
information of the model's own predictive distribution (Amari 1998, "Natural gradient works
efficiently in learning"). Keeping the diagonal only, ``F_ii = E[g_i²]`` with gradients of the
log-likelihood of labels that are drawn from the model itself; given the text before it each token's
gradient has mean zero, so the square of a window's summed gradient estimates the sum over its tokens.

One pass forward keeps the input of every block on disk, one pass backward re-reads the blocks in
reverse order: one block and its gradients are in memory.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tailorbird.calibrate.activations import ActivationFile
from tailorbird.calibrate.stream import StreamingModel
from tailorbird.evaluate.streamed import embed_windows, position_chunks
from tailorbird.plan.candidates import PROBE_KEY, probe_rounding
from tailorbird.progress import Progress, Silent


def fisher_coefficients(
    model: StreamingModel,
    ids: torch.Tensor,
    errors: dict[str, dict[str, float]],
    scratch: Path,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Nats of KL per unit of relative error for every place, from the Fisher diagonal.

    Parameters
    ----------
    model : StreamingModel
        The source.
    ids : LongTensor ``[windows, length]``
    errors : dict
        Place -> errors, with the one of `probe_rounding` under `PROBE_KEY`.
    scratch : Path
        Directory for the inputs of all blocks and one gradient,
        ``(blocks + 1) * windows * length * hidden_size * 4`` bytes.
    seed : int
        For the labels that are drawn from the model.

    Returns
    -------
    dict
        Place -> coefficient, comparable with that of `sensitivity`.
    """
    progress = progress or Silent()
    anatomy = model.anatomy
    windows, length = ids.shape
    blocks = anatomy.blocks
    inputs = [embed_windows(model, ids, scratch / "input-0")]
    with torch.no_grad():
        for index in range(len(blocks)):
            block = model.load_block(index)
            inputs.append(
                ActivationFile(scratch / f"input-{index + 1}", windows, length, anatomy.hidden_size)
            )
            for window in range(windows):
                hidden = inputs[index].read(window, window + 1)
                inputs[index + 1].write(window, model.run_block(block, index, hidden))
            del block
            progress.advance()

    quadratic: dict[str, float] = {}
    gradient = inputs.pop()  # holds the last hidden states, then their gradients, in place
    _head_gradients(model, gradient, windows, length, seed, quadratic)
    for index in reversed(range(len(blocks))):
        block = model.load_block(index)
        stream = inputs[index]
        squares: dict[str, torch.Tensor] = {}
        for window in range(windows):
            for place in blocks[index].linears:
                model.weight_parameter(block, place).requires_grad_(True)
            hidden = stream.read(window, window + 1).requires_grad_(True)
            with torch.enable_grad():
                output = model.run_block(block, index, hidden)
            output.backward(gradient.read(window, window + 1))
            assert hidden.grad is not None  # hidden is a leaf that the output depends on
            gradient.write(window, hidden.grad)
            for place in blocks[index].linears:
                parameter = model.weight_parameter(block, place)
                assert parameter.grad is not None
                found = parameter.grad.t() if place.transposed else parameter.grad
                if place.name in squares:
                    squares[place.name].addcmul_(found, found)
                else:
                    squares[place.name] = found.square()
                parameter.grad = None
        for place in blocks[index].linears:
            weight = model.weight_of(block, place).detach()
            quadratic[place.name] = _half_quadratic(squares.pop(place.name), weight)
        del block
        progress.advance()
    _embedding_gradients(model, ids, gradient, quadratic)
    for stream in (*inputs, gradient):
        stream.close()
        stream.path.unlink()
    tokens = windows * length
    return {
        name: value / tokens / errors[name][PROBE_KEY] if errors[name][PROBE_KEY] > 0 else 0.0
        for name, value in quadratic.items()
    }


def _half_quadratic(squares: torch.Tensor, weight: torch.Tensor) -> float:
    """``½ Σ F Δ²`` of the probe's rounding."""
    change = probe_rounding(weight).sub_(weight).square_()
    return 0.5 * float((squares * change).sum(dtype=torch.float64))


def _head_gradients(
    model: StreamingModel,
    hidden_states: ActivationFile,
    windows: int,
    length: int,
    seed: int,
    quadratic: dict[str, float],
) -> None:
    """Replace the last hidden states by the gradient of the sampled labels' likelihood; score the head."""
    anatomy = model.anatomy
    place = anatomy.embedding if anatomy.tied else anatomy.head
    weight = model.end_parameter(anatomy.head)
    weight.requires_grad_(True)
    squares = torch.zeros_like(weight)
    generator = torch.Generator().manual_seed(seed)
    for window in range(windows):
        hidden = hidden_states.read(window, window + 1).requires_grad_(True)
        for start, stop in position_chunks(length, anatomy.vocab_size):
            with torch.enable_grad():
                logits = model.logits(hidden[:, start:stop])[0]
                labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            loss.backward()
        assert weight.grad is not None
        assert hidden.grad is not None
        squares.addcmul_(weight.grad, weight.grad)
        weight.grad = None
        hidden_states.write(window, hidden.grad)
    weight.requires_grad_(False)
    quadratic[place] = _half_quadratic(squares, model.end_weight(place))
    model.release_ends()


def _embedding_gradients(
    model: StreamingModel, ids: torch.Tensor, gradient: ActivationFile, quadratic: dict[str, float]
) -> None:
    """Score the embedding; a tied pair adds to what its use as the head costs."""
    anatomy = model.anatomy
    weight = model.end_parameter(anatomy.embedding)
    weight.requires_grad_(True)
    squares = torch.zeros_like(weight)
    for window in range(len(ids)):
        with torch.enable_grad():
            hidden = model.embed(ids[window : window + 1])
        hidden.backward(gradient.read(window, window + 1))
        assert weight.grad is not None
        squares.addcmul_(weight.grad, weight.grad)
        weight.grad = None
    weight.requires_grad_(False)
    own = _half_quadratic(squares, model.end_weight(anatomy.embedding))
    quadratic[anatomy.embedding] = quadratic.get(anatomy.embedding, 0.0) + own
    model.release_ends()
