"""Sensitivity from gradients: the diagonal of the Fisher information instead of measured divergences.

To second order the KL between a model and its perturbed self is ``½ Δᵀ F Δ``, with ``F`` the Fisher
information of the model's own predictive distribution (Amari 1998, "Natural gradient works
efficiently in learning"). Keeping the diagonal only, ``F_ii = E[g_i²]`` with gradients of the
log-likelihood of labels that are drawn from the model itself. Given the text, the labels of a window
are independent and each one's gradient has mean zero, so the square of the window's summed gradient
estimates the sum over its tokens. What rounding errors at different weights of a place do to each
other is lost with the rest of ``F``; `sensitivity` measures it.

One pass forward keeps the input of every block on disk, one pass backward re-reads the blocks in
reverse order: one block and its gradients are in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tailorbird.calibrate.activations import ActivationFile
from tailorbird.calibrate.stream import StreamingModel
from tailorbird.evaluate.streamed import batches, embed_windows, position_chunks
from tailorbird.plan.candidates import PROBE_KEY, probe_rounding
from tailorbird.progress import Progress, Silent

#: Called with (place, weight, diagonal of the Fisher information), both ``[out_features, in_features]``.
OnPlace = Callable[[str, Tensor, Tensor], None]


def fisher_coefficients(
    model: StreamingModel,
    ids: Tensor,
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
    scratch, seed, progress
        As `fisher_diagonals`.

    Returns
    -------
    dict
        Place -> coefficient, comparable with that of `scores.measure_coefficients`.
    """
    coefficients: dict[str, float] = {}

    def on_place(name: str, weight: Tensor, diagonal: Tensor) -> None:
        error = errors[name][PROBE_KEY]
        divergence = quadratic_divergence(diagonal, probe_rounding(weight) - weight)
        coefficients[name] = divergence / error if error > 0 else 0.0

    fisher_diagonals(model, ids, on_place, scratch, seed, progress)
    return coefficients


def quadratic_divergence(diagonal: Tensor, change: Tensor) -> float:
    """``½ Σ F_ii Δ_i²``: the KL that a `change` of a weight causes, in nats per token.

    Parameters
    ----------
    diagonal, change : Tensor ``[out_features, in_features]``
    """
    return 0.5 * float((diagonal * change.square()).sum(dtype=torch.float64))


def fisher_diagonals(
    model: StreamingModel,
    ids: Tensor,
    on_place: OnPlace,
    scratch: Path,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Show the Fisher information's diagonal of every place, one place after the other, last block first.

    Parameters
    ----------
    model : StreamingModel
        The source, dense.
    ids : LongTensor ``[windows, length]``
    on_place : callable
        Called with (place name, weight, diagonal), each float32 ``[out_features, in_features]``. The
        diagonal is the mean over the tokens of `ids`; neither may be kept without a copy.
    scratch : Path
        Directory for the inputs of all blocks, the last hidden states and one gradient,
        ``(blocks + 2) * windows * length * hidden_size * 4`` bytes.
    seed : int
        For the labels that are drawn from the model.
    """
    progress = progress or Silent()
    anatomy = model.anatomy
    windows, length = ids.shape
    inputs = _block_inputs(model, ids, scratch, progress)
    last = inputs.pop()
    gradient = ActivationFile(scratch / "gradient", windows, length, anatomy.hidden_size)
    labels = _output_gradients(model, last, gradient, on_place, seed)
    for index in reversed(range(len(anatomy.blocks))):
        _block_gradients(model, index, inputs[index], gradient, on_place)
        progress.advance()
    _embedding_gradients(model, ids, labels, last, gradient, on_place)
    for stream in (*inputs, last, gradient):
        stream.close()
        stream.path.unlink()


@torch.no_grad()
def _block_inputs(
    model: StreamingModel, ids: Tensor, scratch: Path, progress: Progress
) -> list[ActivationFile]:
    """Hidden states that enter each block, and those that leave the last."""
    windows, length = ids.shape
    inputs = [embed_windows(model, ids, scratch / "input-0")]
    for index in range(len(model.anatomy.blocks)):
        block = model.load_block(index)
        entered = inputs[-1]
        left = ActivationFile(scratch / f"input-{index + 1}", windows, length, model.anatomy.hidden_size)
        for start, stop in batches(windows, length):
            left.write(start, model.run_block(block, index, entered.read(start, stop)))
        inputs.append(left)
        del block
        progress.advance()
    return inputs


def _output_gradients(
    model: StreamingModel, last: ActivationFile, gradient: ActivationFile, on_place: OnPlace, seed: int
) -> Tensor:
    """Draw labels; write the gradients of their likelihood by the last hidden states; show an untied head.

    Returns the labels, ``[windows, length]``.
    """
    anatomy = model.anatomy
    weight = model.end_parameter(anatomy.head)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.empty(last.windows, last.length, dtype=torch.long)
    squares = None if anatomy.tied else torch.zeros_like(weight)
    for window in range(last.windows):
        hidden = last.read(window, window + 1)
        with torch.no_grad():
            for start, stop in position_chunks(last.length, anatomy.vocab_size):
                probability = model.logits(hidden[:, start:stop])[0].softmax(-1)
                labels[window, start:stop] = torch.multinomial(probability, 1, generator=generator)[:, 0]
        by_weight = None if squares is None else torch.zeros_like(squares)
        gradient.write(window, _likelihood_gradients(model, hidden, labels[window], by_weight))
        if squares is not None and by_weight is not None:
            squares.addcmul_(by_weight, by_weight)
    if squares is not None:
        on_place(anatomy.head, weight.detach(), squares.div_(labels.numel()))
    model.release_ends()
    return labels


def _likelihood_gradients(
    model: StreamingModel, hidden: Tensor, labels: Tensor, by_weight: Tensor | None
) -> Tensor:
    """Gradient of ``-log p(labels)`` by the last hidden states ``[1, T, hidden]``.

    That by the head's weight is added to `by_weight` where it is given.
    """
    anatomy = model.anatomy
    weight = model.end_parameter(anatomy.head)
    by_hidden = torch.empty_like(hidden)
    weight.requires_grad_(by_weight is not None)
    for start, stop in position_chunks(hidden.shape[1], anatomy.vocab_size):
        with torch.enable_grad():
            part = hidden[:, start:stop].detach().requires_grad_(True)
            logits = model.logits(part)[0]
            loss = torch.nn.functional.cross_entropy(logits, labels[start:stop], reduction="sum")
        by_hidden[:, start:stop], *others = torch.autograd.grad(
            loss, (part,) if by_weight is None else (part, weight)
        )
        if by_weight is not None:
            by_weight += others[0]
    weight.requires_grad_(False)
    return by_hidden


def _block_gradients(
    model: StreamingModel, index: int, entered: ActivationFile, gradient: ActivationFile, on_place: OnPlace
) -> None:
    """Take the gradients back through one block, and show its linears."""
    block = model.load_block(index)
    places = model.anatomy.blocks[index].linears
    parameters = [model.weight_parameter(block, place).requires_grad_(True) for place in places]
    squares = [torch.zeros_like(parameter) for parameter in parameters]
    for window in range(entered.windows):
        hidden = entered.read(window, window + 1).requires_grad_(True)
        with torch.enable_grad():
            output = model.run_block(block, index, hidden)
        found = torch.autograd.grad(output, (hidden, *parameters), gradient.read(window, window + 1))
        gradient.write(window, found[0])
        for total, by_weight in zip(squares, found[1:], strict=True):
            total.addcmul_(by_weight, by_weight)
    tokens = entered.windows * entered.length
    for place, total in zip(places, squares, strict=True):
        diagonal = total.div_(tokens)
        on_place(place.name, model.weight_of(block, place), diagonal.t() if place.transposed else diagonal)


def _embedding_gradients(
    model: StreamingModel,
    ids: Tensor,
    labels: Tensor,
    last: ActivationFile,
    gradient: ActivationFile,
    on_place: OnPlace,
) -> None:
    """Show the embedding; the gradient of a tied pair is the sum of those of its two uses."""
    anatomy = model.anatomy
    weight = model.end_weight(anatomy.embedding)
    squares = torch.zeros_like(weight)
    for window in range(len(ids)):
        total = model.embedding_gradient(ids[window : window + 1], gradient.read(window, window + 1))
        if anatomy.tied:
            _likelihood_gradients(model, last.read(window, window + 1), labels[window], total)
        squares.addcmul_(total, total)
    on_place(anatomy.embedding, weight, squares.div_(ids.numel()))
    model.release_ends()
