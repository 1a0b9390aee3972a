"""How much a change at one place costs the model: the coefficient between its error and the KL.

The linearity theorem (S552, Malinovskii et al. 2024, "Pushing the Limits of Large Language Model
Quantization via the Linearity Theorem") says that the loss of a model grows linearly in the squared
relative error of each layer, with a coefficient of the layer's own, and that the layers add up.
Here the error is the Gram-weighted one of `candidates`, and the coefficient of a place is measured:
the place alone is rounded, and the KL of the model's output is divided by the error.

All places are measured in one pass over the blocks: a copy of the hidden states branches off where
its place is rounded, and travels with the others through the blocks after it, so that each block is
read once and only one is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tailorbird.calibrate.activations import ActivationFile
from tailorbird.calibrate.stream import StreamingModel
from tailorbird.evaluate.streamed import batches, embed_windows, position_chunks
from tailorbird.progress import Progress, Silent


@dataclass(frozen=True)
class Place:
    """A place as the sensitivity pass sees it.

    Attributes
    ----------
    name : str
        Module path; the embedding's for a tied pair.
    block : int
        Index of its block; -1 for the embedding (alone or tied), the number of blocks for the head.
    """

    name: str
    block: int


Perturb = Callable[[str, torch.Tensor], torch.Tensor]


@torch.no_grad()
def measure_divergence(
    model: StreamingModel,
    places: Sequence[Place],
    ids: torch.Tensor,
    perturb: Perturb,
    scratch: Path,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Mean KL (nats per token) of the model's output when each place alone is perturbed.

    Parameters
    ----------
    model : StreamingModel
        The source.
    places : sequence of Place
    ids : LongTensor ``[windows, length]``
    perturb : callable
        (place name, weight ``[out_features, in_features]`` float32) -> perturbed weight.
    scratch : Path
        Directory for the hidden states of all copies,
        ``(1 + len(places)) * windows * length * hidden_size * 4`` bytes.

    Returns
    -------
    dict
        Place name -> KL(source ‖ perturbed), mean over all positions of `ids`.
    """
    progress = progress or Silent()
    anatomy = model.anatomy
    windows, length = ids.shape
    reference = embed_windows(model, ids, scratch / "reference")
    copies: dict[str, ActivationFile] = {}

    def new_copy(name: str) -> ActivationFile:
        copies[name] = ActivationFile(scratch / f"copy-{len(copies)}", windows, length, anatomy.hidden_size)
        return copies[name]

    blocks = len(anatomy.blocks)
    embeddings = [p.name for p in places if p.block < 0]
    heads = [p.name for p in places if p.block >= blocks or (p.block < 0 and anatomy.tied)]
    for name in embeddings:
        original = model.end_weight(name)
        model.set_end_weight(name, perturb(name, original))
        copy = new_copy(name)
        for start, stop in batches(windows, length):
            copy.write(start, model.embed(ids[start:stop]))
        model.set_end_weight(name, original)
    model.release_ends()
    for index, anatomy_block in enumerate(anatomy.blocks):
        block = model.load_block(index)
        for copy in copies.values():
            for start, stop in batches(windows, length):
                copy.write(start, model.run_block(block, index, copy.read(start, stop)))
        here = [p for p in places if p.block == index]
        by_name = {linear.name: linear for linear in anatomy_block.linears}
        for place in here:
            linear = by_name[place.name]
            original = model.weight_of(block, linear)
            model.set_weight(block, linear, perturb(place.name, original))
            copy = new_copy(place.name)
            for start, stop in batches(windows, length):
                copy.write(start, model.run_block(block, index, reference.read(start, stop)))
            model.set_weight(block, linear, original)
        for start, stop in batches(windows, length):
            reference.write(start, model.run_block(block, index, reference.read(start, stop)))
        del block
        progress.advance()

    totals = dict.fromkeys((p.name for p in places), 0.0)
    originals = {name: model.end_weight(name) for name in heads}
    perturbed = {name: perturb(name, weight) for name, weight in originals.items()}
    for window in range(windows):
        # In float64, since the rounding of float32 would hide divergences below some 1e-8; half as many
        # positions at once then take the memory that is foreseen.
        for start, stop in position_chunks(length, 2 * anatomy.vocab_size):

            def log_probability(
                stream: ActivationFile, w: int = window, a: int = start, b: int = stop
            ) -> torch.Tensor:
                return model.logits(stream.read(w, w + 1)[:, a:b])[0].double().log_softmax(-1)

            target = log_probability(reference)
            probability = target.exp()
            for place in places:
                if place.name in heads:
                    model.set_end_weight(place.name, perturbed[place.name])
                other = log_probability(copies.get(place.name, reference))
                totals[place.name] += float((probability * (target - other)).sum())
                if place.name in heads:
                    model.set_end_weight(place.name, originals[place.name])
        progress.advance()
    model.release_ends()
    for stream in (reference, *copies.values()):
        stream.close()
        stream.path.unlink()
    return {name: max(total, 0.0) / (windows * length) for name, total in totals.items()}
