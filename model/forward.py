"""One pass of the model over the next positions of any rows of a cache: steps, chunks and pictures are the same to it.

Between the matrix products of a layer stand four operations: `model.kernels` has them for a CUDA device with Triton,
`model.reference` for everything else. On CUDA, passes of up to `BUCKETS[-1]` positions can be captured as graphs, one for each
bucket, filled up with positions that nobody sees. Steps of a few rows on a CPU in float32 are taken by `model.step`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from model import batch, reference
from model.batch import RowChunk
from model.functional import rms_norm
from model.quantized import linear
from model.step import Step

if TYPE_CHECKING:
    from model.cache import Cache
    from model.gemma import Block, Gemma, LayerConfig

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 192, 320)  # positions of a captured pass: steps; with a chunk; with a picture


class ForwardPass:
    """Passes of `model` over rows of `cache`. Only one thread may have it."""

    def __init__(self, model: Gemma, cache: Cache, operations: ModuleType | None = None) -> None:
        self.model, self.cache = model, cache
        self._operations: Any = operations or _operations(model.device)
        self._layers: list[tuple[LayerConfig, Block, Tensor, Tensor]] = list(
            zip(model.config.layers, model.blocks, cache.keys, cache.values, strict=True)  # type: ignore[arg-type]
        )
        self._step: Step | None = None
        self._graphs: dict[int, tuple[Tensor, Tensor, Callable[[], object], Tensor]] = {}

    def __call__(self, chunks: Sequence[RowChunk], x: Tensor) -> Tensor | None:
        """Appends embeddings x [positions of all chunks, H], in their order. Returns the hidden states after the final norm of
        the positions that are wanted [wanted, H], good until the next pass; None where none is. Raises RowFull before
        anything is written."""
        batch.check(chunks, self.cache)
        with torch.inference_mode(), self.model.threads.running(self.model.product, len(x)):
            hidden = self._hidden(chunks, x)
        for chunk in chunks:
            self.cache.advance(chunk.row, chunk.count)
        return hidden

    def _hidden(self, chunks: Sequence[RowChunk], x: Tensor) -> Tensor | None:
        wanted = batch.wanted(chunks)
        if self._operations is reference and Step.suits(self.model, self.cache, chunks):
            self._step = self._step or Step(self.model, self.cache)
            hidden = self._step([chunk.row for chunk in chunks], x, bool(wanted))
        elif bucket := min((size for size in self._graphs if size >= len(x)), default=None):
            table, static_x, replay, hidden = self._graphs[bucket]
            table.copy_(batch.pinned(self._operations.table(chunks, self.cache, bucket), x.device), non_blocking=True)
            static_x[: len(x)] = x
            replay()
        else:
            return self._run(x, self._operations.metadata(chunks, self.cache), chunks)
        return None if hidden is None or not wanted else select(hidden, wanted)

    def _run(
        self, embedded: Tensor, metadata: Mapping[LayerConfig, Any], chunks: Sequence[RowChunk] | None = None
    ) -> Tensor | None:
        """Hidden states after the final norm [N, H]. With `chunks` the last layer computes no more than its keys and values
        for what is not wanted: nothing else is left of what was heard."""
        model, operations = self.model, self._operations
        eps = model.config.eps
        x, y = embedded, rms_norm(embedded, eps, self._layers[0][1].input_norm)
        for index, (layer, block, keys, values) in enumerate(self._layers, start=1):
            last, seen = index == len(self._layers), metadata[layer]
            query = operations.norm_rope_write(linear(y, block.attention.qkv), block.attention, seen, keys, values)
            if last and chunks and len(wanted := batch.wanted(chunks)) < len(x):
                if not wanted:
                    return None
                x, query = select(x, wanted), select(query, wanted)
                seen = operations.of_wanted(seen, layer, chunks, self.cache)
            y = linear(operations.attend(query, keys, values, seen), block.attention.out)
            x, y = operations.add_norm(x, y, block.post_attention_norm, block.pre_mlp_norm, eps, None)
            y = linear(operations.gelu_up(linear(y, block.mlp.gate_up)), block.mlp.down)
            next_norm = model.norm if last else self._layers[index][1].input_norm
            x, y = operations.add_norm(x, y, block.post_mlp_norm, next_norm, eps, block.scale)
        return y

    def capture(self, buckets: Sequence[int] = BUCKETS) -> None:
        """Records a graph of each bucket, the largest first, since the smaller ones then share its memory; without the
        kernels, none. What it runs to do so writes to no position of any row."""
        if self._operations is reference:
            return
        pool = torch.cuda.graph_pool_handle() if self.model.device.type == "cuda" else None
        x = torch.zeros(max(buckets, default=0), self.model.config.hidden_size, device=self.model.device, dtype=self.model.dtype)
        with torch.inference_mode():
            for size in sorted(buckets, reverse=True):
                table = torch.from_numpy(self._operations.table([], self.cache, size)).to(x.device)
                self._graphs[size] = (table, x[:size], *record(partial(self._static, table, x[:size]), pool))

    def _static(self, table: Tensor, x: Tensor) -> Tensor:
        hidden = self._run(x, self._operations.views(table, self.cache))
        assert hidden is not None
        return hidden


def record(run: Callable[[], Tensor], pool: Any) -> tuple[Callable[[], object], Tensor]:
    """A CUDA graph of what `run` launches: what replays it, and the tensor where its result then lies."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles the kernels and makes room for the products, which may not happen while a graph is recorded
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = run()
    return graph.replay, result


def select(x: Tensor, places: Sequence[int]) -> Tensor:
    """Of [N, ...] these, which are in order."""
    if places[-1] - places[0] + 1 == len(places):
        return x[places[0] : places[-1] + 1]
    return x.index_select(0, batch.upload(places, x.device))


def _operations(device: torch.device) -> ModuleType:
    if device.type != "cuda" or not torch.cuda.is_available():
        return reference
    try:
        from model import kernels
    except ImportError:  # torch brings Triton along on Linux alone
        return reference
    return kernels
