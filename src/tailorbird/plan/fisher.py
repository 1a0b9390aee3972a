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
from typing import Any

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
    """Nats of KL per unit of relative error for every place, from the Fisher diagonal.

    Parameters
    ----------
    model : StreamingModel
        The source.
    ids : LongTensor ``[windows, length]``
    errors : dict
        Place -> errors, with the one of `probe_rounding` under `PROBE_KEY`.
    ledger, seed, progress
        As `fisher_diagonals`.

    Returns
    -------
    dict
        Place -> coefficient, comparable with that of `scores.measure_coefficients`.
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
    """What `reduce` makes of the Fisher information's diagonal of every place, last block first.

    Parameters
    ----------
    model : StreamingModel
        The source, dense.
    ids : LongTensor ``[windows, length]``
    reduce : callable
        Called with (place name, weight, diagonal), each float32 ``[out_features, in_features]``. The
        diagonal is the mean over the tokens of `ids`; neither may be kept without a copy.
    ledger : Ledger
        Where finished blocks are marked, and the inputs of all blocks, the last hidden states and two
        gradients lie, ``(blocks + 3) * windows * length * hidden_size * 4`` bytes.
    seed : int
        For the labels that are drawn from the model.

    Returns
    -------
    dict
        Place -> what `reduce` returned.
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
        head = self.ledger.step("head", self._head)
        labels = torch.tensor(head["labels"])
        found: dict[str, float] = head["found"]
        for index in reversed(range(blocks)):
            needed = {f"input-{i}" for i in (*range(index), blocks)} | {f"gradient-{index}"}
            found |= self.ledger.step(f"block-{index:05d}", partial(self._block, index), needed)
            progress.advance()
        found |= self.ledger.step("embedding", partial(self._embedding, labels))
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

    def _head(self) -> dict[str, Any]:
        """Draw labels; keep the gradients of their likelihood by the last hidden states; an untied head."""
        model, anatomy = self.model, self.model.anatomy
        blocks = len(anatomy.blocks)
        last = self.ledger.open_stream(f"input-{blocks}", *self.shape)
        gradient = self.ledger.new_stream(f"gradient-{blocks}", *self.shape)
        weight = model.end_parameter(anatomy.head)
        generator = torch.Generator().manual_seed(self.seed)
        labels = torch.empty(self.windows, self.length, dtype=torch.long)
        squares = None if anatomy.tied else torch.zeros_like(weight)
        for window in range(self.windows):
            hidden = last.read(window, window + 1)
            with torch.no_grad():
                for start, stop in position_chunks(self.length, anatomy.vocab_size):
                    probability = model.logits(hidden[:, start:stop])[0].softmax(-1)
                    labels[window, start:stop] = torch.multinomial(probability, 1, generator=generator)[:, 0]
            by_weight = None if squares is None else torch.zeros_like(squares)
            gradient.write(window, _likelihood_gradients(model, hidden, labels[window], by_weight))
            if squares is not None and by_weight is not None:
                squares.addcmul_(by_weight, by_weight)
            del by_weight
        found = {}
        if squares is not None:
            diagonal = squares.div_(labels.numel())
            found[anatomy.head] = self.reduce(anatomy.head, weight.detach(), diagonal)
        model.release_ends()
        last.close()
        gradient.close()
        return {"labels": labels.tolist(), "found": found}

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

    def _embedding(self, labels: Tensor) -> dict[str, float]:
        """The embedding; the gradient of a tied pair is the sum of those of its two uses."""
        model, anatomy = self.model, self.model.anatomy
        last = self.ledger.open_stream(f"input-{len(anatomy.blocks)}", *self.shape)
        gradient = self.ledger.open_stream("gradient-0", *self.shape)
        weight = model.end_weight(anatomy.embedding)
        squares = torch.zeros_like(weight)
        for window in range(self.windows):
            total = model.embedding_gradient(self.ids[window : window + 1], gradient.read(window, window + 1))
            if anatomy.tied:
                _likelihood_gradients(model, last.read(window, window + 1), labels[window], total)
            squares.addcmul_(total, total)
            del total
        found = self.reduce(anatomy.embedding, weight, squares.div_(self.ids.numel()))
        model.release_ends()
        last.close()
        gradient.close()
        return {anatomy.embedding: found}


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
        del others  # it has the size of the head
    weight.requires_grad_(False)
    return by_hidden
