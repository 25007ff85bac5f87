"""The layer as separate operations, one hand-written kernel a phase: the stronger baseline of tools/bench_stack.py.

Four cuBLAS products (16-bit operands on tensor cores, float32 sums, one rounding at the store) and one kernel for each
phase between them; nothing is fused across phases, scores and probabilities are materialised in the storage dtype.
tools/cupy_ops.py is the same layer with CuPy's own operations in place of these kernels.
The cache holds K normalised and rotated, so that decode reads it as it is. K and V are never repeated for their group:
products are batched over KV heads, a group's queries are rows of one matrix. Nothing is allocated in a call, so a
stack of layers can be captured in a CUDA graph; for that cuBLAS is called through ctypes, since CuPy refuses to during
capture.

    python tools/separate_ops.py        compares it with the float64 reference; needs a GPU
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cupy
import numpy as np

import cupy_attn as ca
from cupy_attn import ops, reference
from cupy_attn.arrays import storage_dtype
from cupy_attn.bench import random_layer
from cupy_attn.kernels import CUDA_NAMES

DATA_TYPES = {"float16": 2, "bfloat16": 14}  # cudaDataType_t
BAR = 2e-2  # relative L2 against the reference, norm weights near one

SOURCE = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>

constexpr int VECTOR = 8;                    // elements read or written at a time: 16 bytes
constexpr int LANES = HEAD_DIM / VECTOR;     // threads that share a head
static_assert(LANES <= 32 && 32 % LANES == 0, "a head must be a power of two of vectors, within a warp");

__device__ void load8(const STORAGE* from, float* to) {
    const uint4 raw = *reinterpret_cast<const uint4*>(from);
    const STORAGE* values = reinterpret_cast<const STORAGE*>(&raw);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) to[j] = static_cast<float>(values[j]);
}

__device__ void store8(STORAGE* to, const float* from) {
    uint4 raw;
    STORAGE* values = reinterpret_cast<STORAGE*>(&raw);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) values[j] = static_cast<STORAGE>(from[j]);
    *reinterpret_cast<uint4*>(to) = raw;
}

struct Sum {
    static constexpr float ZERO = 0.0f;
    static __device__ float of(float a, float b) { return a + b; }
};

struct Max {
    static constexpr float ZERO = -1e30f;  // finite: the difference of two is not NaN
    static __device__ float of(float a, float b) { return fmaxf(a, b); }
};

template <class Op> __device__ float reduce(float x, int lanes) {
    for (int offset = lanes / 2; offset; offset /= 2) x = Op::of(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}

template <class Op> __device__ float reduce_block(float x) {
    __shared__ float parts[32];
    x = reduce<Op>(x, 32);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    return reduce<Op>(threadIdx.x % 32 < blockDim.x / 32 ? parts[threadIdx.x % 32] : Op::ZERO, 32);
}

// y[r, i] = x[r, i] / sqrt(mean_i(x[r, i]^2) + eps) * weight[i]. Grid (rows), block: H / 8 rounded up to warps.
extern "C" __global__ void rms_norm(const STORAGE* x, const STORAGE* weight, STORAGE* y, int size, float eps) {
    const int i = threadIdx.x * VECTOR;
    const long long at = static_cast<long long>(blockIdx.x) * size + i;
    float values[VECTOR] = {}, scale[VECTOR], squares = 0.0f;
    if (i < size) load8(x + at, values);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) squares += values[j] * values[j];
    const float rstd = rsqrtf(reduce_block<Sum>(squares) / size + eps);
    if (i >= size) return;
    load8(weight + i, scale);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) values[j] *= rstd * scale[j];
    store8(y + at, values);
}

// The same over the D elements of every query and key head, in place. LANES threads a head, rows = tokens (Hq + Hkv).
extern "C" __global__ void qk_norm(STORAGE* qkv,  // [tokens, Hq + 2 Hkv, D]
                                   const STORAGE* q_weight, const STORAGE* k_weight, int rows, int num_q_heads,
                                   int num_kv_heads, float eps) {
    const int thread = blockIdx.x * blockDim.x + threadIdx.x;
    const int row = thread / LANES, i = thread % LANES * VECTOR;
    const int token = row / (num_q_heads + num_kv_heads), head = row % (num_q_heads + num_kv_heads);
    STORAGE* at = qkv + (static_cast<long long>(token) * (num_q_heads + 2 * num_kv_heads) + head) * HEAD_DIM + i;
    float values[VECTOR] = {}, scale[VECTOR], squares = 0.0f;
    if (row < rows) load8(at, values);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) squares += values[j] * values[j];
    const float rstd = rsqrtf(reduce<Sum>(squares, LANES) / HEAD_DIM + eps);
    if (row >= rows) return;
    load8((head < num_q_heads ? q_weight : k_weight) + i, scale);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) values[j] *= rstd * scale[j];
    store8(at, values);
}

// Rotate pairs (i, i + D/2): queries into q, head by head, keys to their place in the cache. LANES / 2 threads a head.
extern "C" __global__ void rope(const STORAGE* qkv,  // [B, S, Hq + 2 Hkv, D]
                                const float* cos, const float* sin,  // [capacity, D/2]
                                STORAGE* q,      // [B, Hq, S, D]
                                STORAGE* cache,  // [B, Hkv, capacity, D]
                                int rows, int num_q_heads, int num_kv_heads, int seq, int start, int capacity) {
    const int thread = blockIdx.x * blockDim.x + threadIdx.x;
    const int row = thread / (LANES / 2), i = thread % (LANES / 2) * VECTOR;
    if (row >= rows) return;
    const int token = row / (num_q_heads + num_kv_heads), head = row % (num_q_heads + num_kv_heads);
    const int b = token / seq, s = token % seq;
    const long long from_row = static_cast<long long>(token) * (num_q_heads + 2 * num_kv_heads) + head;
    const long long q_row = (static_cast<long long>(b) * num_q_heads + head) * seq + s;
    const long long k_row = (static_cast<long long>(b) * num_kv_heads + head - num_q_heads) * capacity + start + s;
    const STORAGE* from = qkv + from_row * HEAD_DIM + i;
    STORAGE* to = (head < num_q_heads ? q + q_row * HEAD_DIM : cache + k_row * HEAD_DIM) + i;
    const long long angle = static_cast<long long>(start + s) * (HEAD_DIM / 2) + i;
    float low[VECTOR], high[VECTOR], new_low[VECTOR], new_high[VECTOR];
    load8(from, low);
    load8(from + HEAD_DIM / 2, high);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) {
        new_low[j] = low[j] * cos[angle + j] - high[j] * sin[angle + j];
        new_high[j] = high[j] * cos[angle + j] + low[j] * sin[angle + j];
    }
    store8(to, new_low);
    store8(to + HEAD_DIM / 2, new_high);
}

// Causal softmax of each row, in place; what a query may not see becomes 0 unread. Grid (B Hq S), block: whole warps.
extern "C" __global__ void softmax(STORAGE* scores, int seq, int start, int vectors) {  // [B Hq S, 8 vectors]
    const int visible = start + blockIdx.x % seq + 1;
    STORAGE* row = scores + static_cast<long long>(blockIdx.x) * vectors * VECTOR;
    float values[VECTOR], largest = Max::ZERO, sum = 0.0f;
    for (int i = threadIdx.x * VECTOR; i < visible; i += blockDim.x * VECTOR) {
        load8(row + i, values);
        const float before = largest;
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) largest = i + j < visible ? fmaxf(largest, values[j]) : largest;
        sum *= __expf(before - largest);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) sum += i + j < visible ? __expf(values[j] - largest) : 0.0f;
    }
    const float row_max = reduce_block<Max>(largest);
    const float scale = 1.0f / reduce_block<Sum>(sum * __expf(largest - row_max));
    for (int i = threadIdx.x * VECTOR; i < vectors * VECTOR; i += blockDim.x * VECTOR) {
        if (i < visible) load8(row + i, values);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) values[j] = i + j < visible ? __expf(values[j] - row_max) * scale : 0.0f;
        store8(row + i, values);
    }
}

// y += x, 8 elements a thread.
extern "C" __global__ void add(STORAGE* y, const STORAGE* x, long long count) {
    const long long i = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) * VECTOR;
    if (i >= count) return;
    float a[VECTOR], b[VECTOR];
    load8(y + i, a);
    load8(x + i, b);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) a[j] += b[j];
    store8(y + i, a);
}
"""
THREADS = 256
VECTOR = 8


class Cublas:
    """A cuBLAS handle of our own, for row-major 16-bit products with float32 sums.

    Parameters
    ----------
    dtype : dtype
        float16 or bfloat16.
    """

    WORKSPACE_BYTES = 32 << 20  # what NVIDIA recommends for compute capability 9.0
    COMPUTE_32F, DEFAULT_TENSOR_OP = 68, 99  # cublasComputeType_t, cublasGemmAlgo_t

    def __init__(self, dtype: Any) -> None:
        cupy.cuda.device.get_cublas_handle()  # makes CuPy load its cuBLAS
        maps = Path("/proc/self/maps").read_text().splitlines()
        self._lib = ctypes.CDLL(next(line.split(maxsplit=5)[5] for line in maps if "/libcublas.so" in line))
        self._type = DATA_TYPES[np.dtype(dtype).name]
        self._workspace = cupy.empty(self.WORKSPACE_BYTES, cupy.uint8)
        self._stream: int | None = None
        pointer, number, stride = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong
        self._lib.cublasSetStream_v2.argtypes = (pointer, pointer)
        self._lib.cublasSetWorkspace_v2.argtypes = (pointer, pointer, ctypes.c_size_t)
        head: list[Any] = [pointer, *[number] * 5, pointer]  # handle, transa, transb, m, n, k, alpha
        plain: list[Any] = [pointer, number, number]  # matrix, type, leading dimension
        matrices = [*plain, *plain, pointer, *plain]  # a, b, beta, c
        strided = [*plain, stride, *plain, stride, pointer, *plain, stride, number]  # and batch
        self._lib.cublasGemmEx.argtypes = (*head, *matrices, number, number)
        self._lib.cublasGemmStridedBatchedEx.argtypes = (*head, *strided, number, number)
        self._handle = ctypes.c_void_p()
        self._call("cublasCreate_v2", ctypes.byref(self._handle), handle=False)

    def _call(self, name: str, *args: Any, handle: bool = True) -> None:
        status = getattr(self._lib, name)(*(self._handle,) * handle, *args)
        if status:
            raise RuntimeError(f"{name} returned cublasStatus_t {status}.")

    @property
    def version(self) -> int:
        """The library's own number, 130100 for 13.1.0."""
        number = ctypes.c_int()
        self._call("cublasGetVersion_v2", ctypes.byref(number))
        return number.value

    def _use_current_stream(self) -> None:
        """Bind the handle to the current stream: setting it also drops the workspace."""
        stream = cupy.cuda.get_current_stream().ptr
        if stream != self._stream:
            self._call("cublasSetStream_v2", stream)
            self._call("cublasSetWorkspace_v2", self._workspace.data.ptr, self.WORKSPACE_BYTES)
            self._stream = stream

    def linear(self, x: Any, weight: Any, out: Any) -> None:
        """``out[m, n] = x[m, k] @ weight[n, k].T``; cuBLAS is column-major and sees every matrix transposed."""
        (n, k), m = weight.shape, x.size // weight.shape[1]
        one, zero, t = ctypes.c_float(1), ctypes.c_float(0), self._type
        self._use_current_stream()
        self._call(
            "cublasGemmEx", 1, 0, n, m, k, ctypes.byref(one), weight.data.ptr, t, k, x.data.ptr, t, k,
            ctypes.byref(zero), out.data.ptr, t, n, self.COMPUTE_32F, self.DEFAULT_TENSOR_OP,
        )  # fmt: skip

    def batched(
        self, out: Any, a: Any, b: Any, shape: tuple[int, int, int, int], *, transposed: bool, alpha: float = 1.0,
        row: tuple[int, int, int], matrix: tuple[int, int, int],
    ) -> None:  # fmt: skip
        """``out[i] = alpha a[i] @ b[i]`` (``b[i].T`` if transposed) for i < batch.

        ``shape`` is (batch, m, n, k); ``row`` and ``matrix`` are elements from a row and from a matrix to the next,
        of out, a and b.
        """
        batch, m, n, k = shape
        scale, zero, t = ctypes.c_float(alpha), ctypes.c_float(0), self._type
        self._use_current_stream()
        self._call(
            "cublasGemmStridedBatchedEx", int(transposed), 0, n, m, k, ctypes.byref(scale),
            b.data.ptr, t, row[2], matrix[2], a.data.ptr, t, row[1], matrix[1],
            ctypes.byref(zero), out.data.ptr, t, row[0], matrix[0], batch, self.COMPUTE_32F, self.DEFAULT_TENSOR_OP,
        )  # fmt: skip


class Scratch:
    """What the layers of a stack share: buffers, rotary tables, kernels, the cuBLAS handle.

    Parameters
    ----------
    config : AttentionConfig
        Full attention, no biases, head_dim 64, 128 or 256.
    dtype : str or dtype
        float16 or bfloat16.
    batch, seq, capacity : int
        B, the most new tokens of a call, the most tokens of a sequence.

    Raises
    ------
    ValueError
        The config has what the baseline does not do.
    """

    def __init__(self, config: ca.AttentionConfig, dtype: Any, *, batch: int, seq: int, capacity: int) -> None:
        self.dtype, dim, heads = storage_dtype(dtype), config.head_dim, config.num_attention_heads
        if self.dtype.itemsize != 2:
            raise ValueError(f"dtype is {self.dtype}; the baseline runs on float16 or bfloat16.")
        if dim not in (64, 128, 256) or config.hidden_size % VECTOR or config.hidden_size > 1024 * VECTOR:
            raise ValueError(f"head_dim {dim}, hidden_size {config.hidden_size}; use 64, 128 or 256 and at most 8192.")
        if config.attention_bias or config.window(0) is not None:
            raise ValueError("the config has biases or a sliding window; the baseline has neither.")
        self.config, self.batch, self.seq, self.capacity = config, batch, seq, capacity
        tokens, rows = batch * seq, config.q_size + 2 * config.kv_size
        sizes = {
            "h": tokens * config.hidden_size, "qkv": tokens * rows, "q": tokens * config.q_size,
            "scores": tokens * heads * padded(capacity), "by_head": tokens * config.q_size,
            "by_token": tokens * config.q_size,
        }  # fmt: skip
        self.buffers = {name: cupy.empty(size, self.dtype) for name, size in sizes.items()}
        self.cos, self.sin = (
            cupy.asarray(a.astype(np.float32)) for a in ca.rope_angles(config, np.arange(capacity), capacity)
        )
        self.blas = Cublas(self.dtype)

    @functools.cached_property
    def _kernels(self) -> dict[str, Any]:
        storage, dim = CUDA_NAMES[self.dtype.name], self.config.head_dim
        module = cupy.RawModule(code=SOURCE, options=("-std=c++17", f"-DSTORAGE={storage}", f"-DHEAD_DIM={dim}"))
        return {name: module.get_function(name) for name in ("rms_norm", "qk_norm", "rope", "softmax", "add")}

    def launch(self, name: str, blocks: int, threads: int, *args: Any) -> None:
        """Launch a kernel of SOURCE; an int argument is passed as int32, a float as float32."""
        wrap = {int: np.int32, float: np.float32}
        self._kernels[name]((blocks,), (threads,), tuple(wrap.get(type(a), lambda a: a)(a) for a in args))


class SeparateLayer:
    """One layer with its weights and its cache.

    Parameters
    ----------
    weights : AttentionWeights
        Converted to the scratch's dtype.
    scratch : Scratch
        Says config, dtype, batch, largest call and capacity.
    """

    scratch_type: type[Scratch] = Scratch

    def __init__(self, weights: ca.AttentionWeights, scratch: Scratch) -> None:
        self._s, self._w = scratch, {}
        for name, tensor in weights.astype(scratch.dtype).tensors().items():
            self._w[name] = cupy.asarray(tensor)
        c = scratch.config
        self._heads, self._kv_heads, self._dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self._all_heads, self._eps = self._heads + 2 * self._kv_heads, float(c.rms_norm_eps)
        shape = (scratch.batch, self._kv_heads, scratch.capacity, self._dim)
        self.k, self.v = cupy.zeros(shape, scratch.dtype), cupy.zeros(shape, scratch.dtype)

    def fill(self, k: Any, v: Any) -> None:
        """Take the tokens of another cache: k before norm and RoPE and v, [B, T, Hkv, D]."""
        c, count = self._s.config, k.shape[1]
        normed = ops.rms_norm(k.astype(np.float32), self._w["k_norm"].astype(np.float32), c.rms_norm_eps)
        rotated = ops.apply_rope(normed, self._s.cos[:count], self._s.sin[:count])
        self.k[:, :, :count] = rotated.transpose(0, 2, 1, 3).astype(self.k.dtype)
        self.v[:, :, :count] = v.transpose(0, 2, 1, 3)

    def __call__(self, x: Any, y: Any, start: int) -> None:
        """Run S tokens of every sequence after ``start`` cached ones; y = layer(x) + x, both [B, S, H] and distinct."""
        s, w = self._s, self._w
        batch, seq, hidden = x.shape
        total, tokens = start + seq, batch * seq
        if batch != s.batch or seq > s.seq or total > s.capacity:
            raise ValueError(f"x is {list(x.shape)} after {start} tokens; the scratch has {s.batch}, {s.seq} and "
                             f"{s.capacity}.")  # fmt: skip
        buffer, dim = s.buffers, self._dim

        self.input_norm(x)
        s.blas.linear(buffer["h"][: tokens * hidden], w["qkv_proj"], buffer["qkv"])
        self.qk_norm(tokens)
        self.rope(batch, seq, start)
        self.append_values(batch, seq, start)

        pitch, products, m = padded(total), batch * self._kv_heads, s.config.group * seq
        per_query, per_cache = m * dim, s.capacity * dim
        s.blas.batched(buffer["scores"], buffer["q"], self.k, (products, m, total, dim), transposed=True,
                       alpha=dim**-0.5, row=(pitch, dim, dim), matrix=(m * pitch, per_query, per_cache))  # fmt: skip
        self.softmax(batch, seq, start)
        s.blas.batched(buffer["by_head"], buffer["scores"], self.v, (products, m, dim, total), transposed=False,
                       row=(dim, pitch, dim), matrix=(per_query, m * pitch, per_cache))  # fmt: skip
        attention = buffer["by_head"]
        if seq > 1:
            self.join_heads(batch, seq)
            attention = buffer["by_token"]
        s.blas.linear(attention[: tokens * self._heads * dim], w["o_proj"], y)
        self.add(y, x)

    def input_norm(self, x: Any) -> None:
        """``h = rms_norm(x)``, [tokens, H]."""
        hidden = x.shape[-1]
        self._s.launch("rms_norm", x.size // hidden, 32 * -(-hidden // (32 * VECTOR)), x, self._w["input_norm"],
                       self._s.buffers["h"], hidden, self._eps)  # fmt: skip

    def qk_norm(self, tokens: int) -> None:
        """Norm every query and key head in place, qkv [tokens, Hq + 2 Hkv, D]."""
        rows = tokens * (self._heads + self._kv_heads)
        self._s.launch("qk_norm", -(-rows * (self._dim // VECTOR) // THREADS), THREADS, self._s.buffers["qkv"],
                       self._w["q_norm"], self._w["k_norm"], rows, self._heads, self._kv_heads,
                       self._eps)  # fmt: skip

    def rope(self, batch: int, seq: int, start: int) -> None:
        """Rotate queries of qkv into q [B, Hq, S, D] and keys into their place in the cache."""
        s, rows = self._s, batch * seq * (self._heads + self._kv_heads)
        s.launch("rope", -(-rows * (self._dim // VECTOR // 2) // THREADS), THREADS, s.buffers["qkv"], s.cos, s.sin,
                 s.buffers["q"], self.k, rows, self._heads, self._kv_heads, seq, start, s.capacity)  # fmt: skip

    def append_values(self, batch: int, seq: int, start: int) -> None:
        """Copy values of qkv to their place in the cache."""
        qkv = self._s.buffers["qkv"][: batch * seq * self._all_heads * self._dim]
        new = wide(qkv, batch, seq, self._all_heads)[:, :, self._heads + self._kv_heads :]
        wide(self.v, batch, self._kv_heads, self._s.capacity)[:, :, start : start + seq] = new.transpose(0, 2, 1, 3)

    def softmax(self, batch: int, seq: int, start: int) -> None:
        """Mask and normalise scores [B, Hq, S, padded T] in place."""
        pitch = padded(start + seq)
        threads = min(1024, 32 * -(-pitch // (32 * VECTOR)))
        self._s.launch("softmax", batch * seq * self._heads, threads, self._s.buffers["scores"], seq, start,
                       pitch // VECTOR)  # fmt: skip

    def join_heads(self, batch: int, seq: int) -> None:
        """Copy by_head [B, Hq, S, D] to by_token [B, S, Hq, D]."""
        size = batch * seq * self._heads * self._dim
        by_head = wide(self._s.buffers["by_head"][:size], batch, self._heads, seq)
        wide(self._s.buffers["by_token"][:size], batch, seq, self._heads)[...] = by_head.transpose(0, 2, 1, 3)

    def add(self, y: Any, x: Any) -> None:
        """``y += x``."""
        self._s.launch("add", -(-y.size // (THREADS * VECTOR)), THREADS, y, x, np.int64(y.size))


def padded(count: int) -> int:
    """Return count rounded up to 8: rows of scores start at multiples of 16 bytes."""
    return -(-count // VECTOR) * VECTOR


def wide(a: Any, *shape: int) -> Any:
    """Return contiguous 16-bit data as [*shape, D / 8] of 16 bytes each, so that CuPy's copies move that much."""
    return a.reshape(*shape, -1).view(cupy.complex128)


def self_check(dtype: str, layer_type: type[SeparateLayer] = SeparateLayer, tokens: int = 45) -> float:
    """Return the relative L2 error against the float64 reference, over a prefill, a chunk and two decode steps."""
    config = ca.AttentionConfig.from_dict(
        {"hidden_size": 256, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 128, "rope_theta": 1e6,
         "max_position_embeddings": 4096}
    )  # fmt: skip
    weights = random_layer(config).astype(dtype)
    x = np.random.default_rng(1).standard_normal((2, tokens, config.hidden_size), np.float32).astype(weights.dtype)
    scratch = layer_type.scratch_type(config, dtype, batch=2, seq=tokens, capacity=tokens + 3)
    layer, parts = layer_type(weights, scratch), []
    for start, end in itertools.pairwise((0, tokens - 7, tokens - 2, tokens - 1, tokens)):
        part = cupy.ascontiguousarray(cupy.asarray(x[:, start:end]))
        y = cupy.empty_like(part)
        layer(part, y, start)
        parts.append(cupy.asnumpy(y))
    exact, _ = reference.forward(config, weights, x, residual=x)
    error = ca.relative_l2(np.concatenate(parts, 1), exact)
    return error if math.isfinite(error) else math.inf


def main(layer_type: type[SeparateLayer] = SeparateLayer, dtypes: Iterable[str] = tuple(DATA_TYPES)) -> None:
    """Check some dtypes; exit status 1 on a miss."""
    errors = {dtype: self_check(dtype, layer_type) for dtype in dtypes}
    for dtype, error in errors.items():
        print(f"{dtype}: relative L2 {error:.1e}, bar {BAR:g}")
    sys.exit(any(error > BAR for error in errors.values()))


if __name__ == "__main__":
    main()
