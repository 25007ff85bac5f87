"""The layer as a CuPy user writes it, float16: the plain baseline of tools/bench_stack.py.

Every phase is one or more of CuPy's own kernels, ``ElementwiseKernel``, ``ReductionKernel``, ufuncs and copies between
views, each on float16 arrays with float32 arithmetic inside; no kernel is written by hand and none does the work of two
phases. The rest is tools/separate_ops.py: the four cuBLAS products, materialised scores, a cache of keys that are
already normalised and rotated. Products go through cuBLAS by ctypes only because CuPy refuses to call its own while a
stream is being captured; it would call the same functions. ``cupy.fuse`` is not used: it gives new arrays, and here
nothing may be allocated, while an ``ElementwiseKernel`` fuses as much.

    python tools/cupy_ops.py        compares it with the float64 reference; needs a GPU
"""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np
from separate_ops import Scratch, SeparateLayer, main, padded

import cupy_attn as ca

# CuPy reduces the last axis of contiguous arrays with CUB, of other views with its generic kernel. For CUB it replaces
# the names of parameters in the expressions as text, so none may be part of another word there.
sum_squares = cupy.ReductionKernel(
    "float16 element", "float32 total", "float(element) * float(element)", "a + b", "total = a", "0",
    "sum_squares", reduce_type="float",
)  # fmt: skip
scale_rows = cupy.ElementwiseKernel(
    "float16 element, float32 squares, float16 weight, float32 size, float32 eps", "float16 scaled",
    "scaled = float(element) * rsqrtf(squares / size + eps) * float(weight)", "scale_rows",
)  # fmt: skip
rotate = cupy.ElementwiseKernel(
    "float16 low, float16 high, float32 cosine, float32 sine", "float16 new_low, float16 new_high",
    "new_low = float(low) * cosine - float(high) * sine; new_high = float(high) * cosine + float(low) * sine", "rotate",
)  # fmt: skip
mask = cupy.ElementwiseKernel(
    "int32 key, int32 query, float32 hidden", "float16 score", "if (key > query) score = hidden", "mask"
)
row_max = cupy.ReductionKernel(
    "float16 element", "float16 largest", "float(element)", "fmaxf(a, b)", "largest = a", "-65504.0f", "row_max",
    reduce_type="float",
)  # fmt: skip
shifted_exp = cupy.ElementwiseKernel(
    "float16 score, float16 largest", "float16 raised", "raised = expf(float(score) - float(largest))", "shifted_exp"
)
row_sum = cupy.ReductionKernel(
    "float16 element", "float32 total", "float(element)", "a + b", "total = a", "0", "row_sum", reduce_type="float"
)
divide = cupy.ElementwiseKernel(
    "float16 raised, float32 total", "float16 share", "share = float(raised) / total", "divide"
)


class CupyScratch(Scratch):
    """What the layers of a stack share, with the results of reductions.

    Raises
    ------
    ValueError
        As :class:`Scratch`; or the dtype is not float16.
    """

    def __init__(self, config: ca.AttentionConfig, dtype: Any, *, batch: int, seq: int, capacity: int) -> None:
        super().__init__(config, dtype, batch=batch, seq=seq, capacity=capacity)
        if self.dtype != np.float16:
            raise ValueError(f"dtype is {self.dtype}; the baseline of CuPy's own operations runs on float16.")
        tokens, heads = batch * seq, config.num_attention_heads
        self.squares = cupy.empty(tokens * (heads + config.num_key_value_heads), np.float32)
        self.largest, self.total = cupy.empty(tokens * heads, np.float16), cupy.empty(tokens * heads, np.float32)
        self.places = cupy.arange(capacity, dtype=np.int32)


class CupyLayer(SeparateLayer):
    """One layer with its weights and its cache; every phase between the products is CuPy's."""

    scratch_type = CupyScratch
    _s: CupyScratch

    def __init__(self, weights: ca.AttentionWeights, scratch: CupyScratch) -> None:
        super().__init__(weights, scratch)
        counts = {"q_norm": self._heads, "k_norm": self._kv_heads}
        self._qk_weight = cupy.stack([self._w[name] for name, count in counts.items() for _ in range(count)])

    def _qkv(self, *tokens: int) -> Any:
        """Return qkv as [*tokens, Hq + 2 Hkv, D]."""
        size = int(np.prod(tokens)) * self._all_heads * self._dim
        return self._s.buffers["qkv"][:size].reshape(*tokens, self._all_heads, self._dim)

    def _norm(self, rows: Any, weight: Any, out: Any) -> None:
        """RMSNorm over the last axis; out may be rows."""
        squares = self._s.squares[: rows.size // rows.shape[-1]].reshape(*rows.shape[:-1], 1)
        sum_squares(rows, out=squares, axis=-1, keepdims=True)
        scale_rows(rows, squares, weight, float(rows.shape[-1]), self._eps, out)

    def input_norm(self, x: Any) -> None:
        """``h = rms_norm(x)``, [tokens, H]."""
        rows = x.reshape(-1, x.shape[-1])
        self._norm(rows, self._w["input_norm"], self._s.buffers["h"][: x.size].reshape(rows.shape))

    def qk_norm(self, tokens: int) -> None:
        """Norm every query and key head in place, qkv [tokens, Hq + 2 Hkv, D]."""
        heads = self._qkv(tokens)[:, : self._heads + self._kv_heads]
        self._norm(heads, self._qk_weight, heads)

    def rope(self, batch: int, seq: int, start: int) -> None:
        """Rotate queries of qkv into q [B, Hq, S, D] and keys into their place in the cache."""
        s, half = self._s, self._dim // 2
        pairs = self._qkv(batch, seq).reshape(batch, seq, self._all_heads, 2, half)
        q = s.buffers["q"][: batch * seq * self._heads * self._dim].reshape(batch, self._heads, seq, 2, half)
        k = self.k.reshape(batch, self._kv_heads, s.capacity, 2, half)[:, :, start : start + seq]
        angles = [table[start : start + seq, None] for table in (s.cos, s.sin)]
        for heads, to in (
            (pairs[:, :, : self._heads], q),
            (pairs[:, :, self._heads : self._heads + self._kv_heads], k),
        ):
            to = to.transpose(0, 2, 1, 3, 4)
            rotate(heads[..., 0, :], heads[..., 1, :], *angles, to[..., 0, :], to[..., 1, :])

    def append_values(self, batch: int, seq: int, start: int) -> None:
        """Copy values of qkv to their place in the cache."""
        new = self._qkv(batch, seq)[:, :, self._heads + self._kv_heads :]
        self.v[:, :, start : start + seq] = new.transpose(0, 2, 1, 3)

    def softmax(self, batch: int, seq: int, start: int) -> None:
        """Mask and normalise scores [B, Hq, S, padded T] in place."""
        s, total = self._s, start + seq
        rows, pitch = batch * self._heads * seq, padded(total)
        scores = s.buffers["scores"][: rows * pitch].reshape(batch, self._heads, seq, pitch)[..., :total]
        largest, sums = (a[:rows].reshape(batch, self._heads, seq, 1) for a in (s.largest, s.total))
        if seq > 1:  # a single query sees everything
            mask(s.places[:total], s.places[start:total, None], -np.inf, scores)
        row_max(scores, out=largest, axis=-1, keepdims=True)
        shifted_exp(scores, largest, scores)
        row_sum(scores, out=sums, axis=-1, keepdims=True)
        divide(scores, sums, scores)

    def join_heads(self, batch: int, seq: int) -> None:
        """Copy by_head [B, Hq, S, D] to by_token [B, S, Hq, D]."""
        shape = (batch, self._heads, seq, self._dim)
        by_head, by_token = (self._s.buffers[name][: int(np.prod(shape))] for name in ("by_head", "by_token"))
        by_token.reshape(batch, seq, self._heads, self._dim)[...] = by_head.reshape(shape).transpose(0, 2, 1, 3)

    def add(self, y: Any, x: Any) -> None:
        """``y += x``."""
        cupy.add(y, x, out=y)


if __name__ == "__main__":
    main(CupyLayer, ("float16",))
