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
from functools import partial

import torch
from torch import Tensor

from tailorbird.calibrate.ledger import Ledger
from tailorbird.calibrate.stream import StreamingModel
from tailorbird.evaluate.streamed import batches, embed_windows, position_chunks
from tailorbird.plan.candidates import PROBE_KEY, probe_rounding
from tailorbird.progress import Progress, Silent

#: Weights whose change is formed at once.
CHUNK_VALUES = 1 << 20
#: (place, weight, diagonal of the Fisher information), both ``[out_features, in_features]`` -> what to keep.
Reduce = Callable[[str, Tensor, Tensor], float]


def fisher_coefficients(
    model: StreamingModel,
    ids: Tensor,
    errors: dict[str, dict[str, float]],
    ledger: Ledger,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Nats of KL per unit of relative error for every use of a weight, from the Fisher diagonal.

    Parameters
    ----------
    model : StreamingModel
        The source.
    ids : LongTensor ``[windows, length]``
    errors : dict
        Use -> errors, with the one of `probe_rounding` under `PROBE_KEY`.
    ledger, seed, progress
        As `fisher_diagonals`.

    Returns
    -------
    dict
        Use -> coefficient, comparable with that of `sensitivity.measure_coefficients`.
    """

    def coefficient(name: str, weight: Tensor, diagonal: Tensor) -> float:
        error = errors[name][PROBE_KEY]
        step = max(1, CHUNK_VALUES // weight.shape[1])
        parts = zip(weight.split(step), diagonal.split(step), strict=True)
        divergence = sum(quadratic_divergence(d, probe_rounding(w) - w) for w, d in parts)
        return divergence / error if error > 0 else 0.0

    return fisher_diagonals(model, ids, coefficient, ledger, seed, progress)


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
    reduce: Reduce,
    ledger: Ledger,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, float]:
    """What `reduce` makes of the Fisher information's diagonal of every use of a weight, last first.

    Parameters
    ----------
    model : StreamingModel
        The source, dense.
    ids : LongTensor ``[windows, length]``
    reduce : callable
        Called with (name, weight, diagonal), each float32 ``[out_features, in_features]``. The
        diagonal is the mean over the tokens of `ids`; neither may be kept without a copy.
    ledger : Ledger
        Where finished blocks are marked, and the inputs of all blocks, the last hidden states and two
        gradients lie, ``(blocks + 3) * windows * length * hidden_size * 4`` bytes.
    seed : int
        For the labels that are drawn from the model.

    Returns
    -------
    dict
        Use -> what `reduce` returned.
    """
    return _Backward(model, ids, reduce, ledger, seed).run(progress or Silent())


class _Backward:
    """One pass forward and one back; `run` does what is left of both."""

    def __init__(self, model: StreamingModel, ids: Tensor, reduce: Reduce, ledger: Ledger, seed: int) -> None:
        self.model, self.ids, self.reduce, self.ledger, self.seed = model, ids, reduce, ledger, seed
        self.windows, self.length = ids.shape
        self.shape = self.windows, self.length, model.anatomy.hidden_size

    def run(self, progress: Progress) -> dict[str, float]:
        """See `fisher_diagonals`."""
        blocks = len(self.model.anatomy.blocks)
        for index in range(-1, blocks):
            self.ledger.step(f"forward-{index + 1:05d}", partial(self._forward, index))
            progress.advance()
        found: dict[str, float] = self.ledger.step("head", self._head)
        for index in reversed(range(blocks)):
            needed = {f"input-{i}" for i in range(index)} | {f"gradient-{index}"}
            found |= self.ledger.step(f"block-{index:05d}", partial(self._block, index), needed)
            progress.advance()
        found |= self.ledger.step("embedding", self._embedding)
        self.ledger.drop_streams(set())
        return found

    @torch.no_grad()
    def _forward(self, index: int) -> dict[str, float]:
        """Keep what leaves block `index`; -1 stands for the embedding."""
        if index < 0:
            embed_windows(self.model, self.ids, self.ledger.stream("input-0")).close()
            return {}
        block = self.model.load_block(index)
        entered = self.ledger.open_stream(f"input-{index}", *self.shape)
        left = self.ledger.new_stream(f"input-{index + 1}", *self.shape)
        for start, stop in batches(self.windows, self.length):
            left.write(start, self.model.run_block(block, index, entered.read(start, stop)))
        entered.close()
        left.close()
        return {}

    def _head(self) -> dict[str, float]:
        """Draw labels; keep the gradients of their likelihood by the last hidden states; the head."""
        model, anatomy = self.model, self.model.anatomy
        blocks = len(anatomy.blocks)
        last = self.ledger.open_stream(f"input-{blocks}", *self.shape)
        gradient = self.ledger.new_stream(f"gradient-{blocks}", *self.shape)
        weight = model.end_parameter(anatomy.head)
        generator = torch.Generator().manual_seed(self.seed)
        squares = torch.zeros_like(weight)
        for window in range(self.windows):
            by_hidden, by_weight = _likelihood_gradients(model, last.read(window, window + 1), generator)
            gradient.write(window, by_hidden)
            squares.addcmul_(by_weight, by_weight)
            del by_weight
        last.close()
        gradient.close()
        diagonal = squares.div_(self.windows * self.length)
        found = self.reduce(anatomy.head, weight.detach(), diagonal)
        model.release_ends()
        return {anatomy.head: found}

    def _block(self, index: int) -> dict[str, float]:
        """Take the gradients back through one block; its linears."""
        model = self.model
        block = model.load_block(index)
        places = model.anatomy.blocks[index].linears
        parameters = [model.weight_parameter(block, place).requires_grad_(True) for place in places]
        squares = [torch.zeros_like(parameter) for parameter in parameters]
        entered = self.ledger.open_stream(f"input-{index}", *self.shape)
        before = self.ledger.open_stream(f"gradient-{index + 1}", *self.shape)
        after = self.ledger.new_stream(f"gradient-{index}", *self.shape)
        for window in range(self.windows):
            hidden = entered.read(window, window + 1).requires_grad_(True)
            with torch.enable_grad():
                output = model.run_block(block, index, hidden)
            gradients = torch.autograd.grad(output, (hidden, *parameters), before.read(window, window + 1))
            after.write(window, gradients[0])
            for total, by_weight in zip(squares, gradients[1:], strict=True):
                total.addcmul_(by_weight, by_weight)
            del gradients, by_weight
        for stream in (entered, before, after):
            stream.close()
        found = {}
        for place, total in zip(places, squares, strict=True):
            diagonal = total.div_(self.windows * self.length)
            diagonal = diagonal.t() if place.transposed else diagonal
            found[place.name] = self.reduce(place.name, model.weight_of(block, place), diagonal)
        return found

    def _embedding(self) -> dict[str, float]:
        """The embedding, whose use as a tied head is not its own."""
        model, anatomy = self.model, self.model.anatomy
        gradient = self.ledger.open_stream("gradient-0", *self.shape)
        weight = model.end_weight(anatomy.embedding)
        squares = torch.zeros_like(weight)
        for window in range(self.windows):
            by_weight = model.embedding_gradient(
                self.ids[window : window + 1], gradient.read(window, window + 1)
            )
            squares.addcmul_(by_weight, by_weight)
            del by_weight
        gradient.close()
        found = self.reduce(anatomy.embedding, weight, squares.div_(self.ids.numel()))
        model.release_ends()
        return {anatomy.embedding: found}


def _likelihood_gradients(
    model: StreamingModel, hidden: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Gradients of ``-log p`` of labels that are drawn from the model, by what gives their logits.

    Parameters
    ----------
    hidden : Tensor ``[1, T, hidden_size]``
        The last hidden states.

    Returns
    -------
    Tensor, Tensor
        By `hidden` and by the head's weight.
    """
    weight = model.end_parameter(model.anatomy.head)
    by_hidden, by_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    weight.requires_grad_(True)
    for start, stop in position_chunks(hidden.shape[1], model.anatomy.vocab_size):
        with torch.enable_grad():
            part = hidden[:, start:stop].detach().requires_grad_(True)
            logits = model.logits(part)[0]
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        by_hidden[:, start:stop], added = torch.autograd.grad(loss, (part, weight))
        by_weight += added
        del added  # it has the size of the head
    weight.requires_grad_(False)
    return by_hidden, by_weight
