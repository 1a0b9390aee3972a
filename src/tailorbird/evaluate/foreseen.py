"""The speed of a model from what its kernels take, before it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tailorbird.evaluate.kernel_times import kernel_times
from tailorbird.evaluate.stand_ins import Kernel
from tailorbird.formats.modules import CompressedEmbedding, CompressedLinear
from tailorbird.formats.packed import FloatCoding
from tailorbird.hardware.cost import (
    BlockShape,
    KernelTimes,
    ModelShape,
    ProductShape,
    decode_step_seconds,
    prefill_seconds,
)
from tailorbird.model.anatomy import BYTES_PER_CACHED_VALUE
from tailorbird.progress import Progress
from tailorbird.run.fused import obstacle
from tailorbird.run.parts import Layer, linear_shape, parts_of


@dataclass(frozen=True)
class Foreseen:
    """Predicted speed, over all sequences together.

    Attributes
    ----------
    prefill_tokens_per_s, decode_tokens_per_s : float
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float


def foresee(
    model: Any, batch: int, prompt_tokens: int, new_tokens: int, progress: Progress | None = None
) -> Foreseen | None:
    """What `speed` will find of a loaded model; None where it doesn't run in compiled blocks.

    Kernels that weren't timed on this machine yet are timed first.
    """
    if obstacle(model) is not None:
        return None
    shape, kernels = shape_of(model)
    return speeds(shape, kernel_times(kernels, shape, progress), batch, prompt_tokens, new_tokens)


def speeds(
    shape: ModelShape, times: KernelTimes, batch: int, prompt_tokens: int, new_tokens: int
) -> Foreseen:
    """Tokens per second of reading prompts, and of the steps after them."""
    decoding = decode_step_seconds(shape, times, batch, prompt_tokens + new_tokens // 2)
    return Foreseen(
        batch * prompt_tokens / prefill_seconds(shape, times, batch, prompt_tokens), batch / decoding
    )


def shape_of(model: Any) -> tuple[ModelShape, set[Kernel]]:
    """A loaded model as the cost model knows it, and the kernels that it runs.

    Raises
    ------
    Unsuited
        It doesn't run in compiled blocks.
    """
    parts = parts_of(model)
    kernels: set[Kernel] = set()

    def product(module: Any) -> ProductShape:
        kernel = kernel_of(module)
        kernels.add(kernel)
        rows, columns = linear_shape(module)
        if isinstance(module, CompressedLinear):
            size = sum(tensor.nbytes for tensor in module.packed().tensors.values())
        else:
            size = module.weight.nbytes
        return ProductShape(kernel.name, rows * columns, size)

    def block(layer: Layer) -> BlockShape:
        linears = (*layer.attention_in, layer.attention_out, *layer.mlp_in, layer.mlp_out)
        width, attended = linear_shape(layer.attention_out)
        inner = linear_shape(layer.mlp_out)[1]
        cached = 2 * layer.kv_heads * layer.head_dim * BYTES_PER_CACHED_VALUE
        return BlockShape(tuple(map(product, linears)), width, attended, inner, cached, layer.window or None)

    embedding = model.get_input_embeddings()
    looked_up = embedding.embedding_dim if isinstance(embedding, CompressedEmbedding) else 0
    blocks = tuple(map(block, parts.layers))
    return ModelShape(blocks, product(parts.head), linear_shape(parts.head)[0], looked_up), kernels


def kernel_of(module: Any) -> Kernel:
    """How compiled blocks multiply by the weight of a linear."""
    if isinstance(module, CompressedLinear):
        return Kernel(module.coding, module.rounds)
    return Kernel(FloatCoding(str(module.weight.dtype).removeprefix("torch.")))
