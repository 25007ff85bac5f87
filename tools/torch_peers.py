"""The layer as PyTorch's users run it, for tools/bench_peers.py: the one file of the tools that needs PyTorch on a GPU.

Every peer does the whole layer: norm, QKV projection, QK-norm, RoPE, cache write, attention, output projection,
residual. Their caches hold K normalised and rotated, so that decode reads it as it is. Angles are of the storage dtype,
as in transformers.

* ``torch_eager``: PyTorch's own operations, ``scaled_dot_product_attention``.
* ``torch_compile``: the same function through ``torch.compile``.
* ``fa3``: cuBLAS products, FlashAttention-3 (``pip install fa3-fwd``), what lies between through ``torch.compile``.
* ``flashinfer``: the same with FlashInfer's attention over pages.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import cupy
import numpy as np
import torch
import torch.nn.functional as F
from stacks import ROOM, Case, Stack, layer_weights

import cupy_attn as ca
from cupy_attn.arrays import storage_dtype

COMPILE = {"dynamic": False}  # options of torch.compile: one specialisation for each case
PAGE = 16  # tokens; FlashInfer's caches are pages of them
WORKSPACE_BYTES = 256 << 20  # FlashInfer's scratch
TENSOR_CORE_GROUP = 4  # queries of a KV head from which FlashInfer's decode is faster on tensor cores


class Layer(NamedTuple):
    """Weights of one layer and its caches [B, capacity, Hkv, D]."""

    input_norm: torch.Tensor
    qkv_proj: torch.Tensor
    q_norm: torch.Tensor
    k_norm: torch.Tensor
    o_proj: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class Shape(NamedTuple):
    """What the functions below have to know beside tensors; ``start`` tokens are cached."""

    heads: int
    kv_heads: int
    dim: int
    eps: float
    start: int


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Norm the last axis as transformers does: float32 inside, rounded before the weight."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + D/2) of x [B, S, heads, D] by angles [S, 1, D]."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


def append(
    qkv: torch.Tensor, q_norm: torch.Tensor, k_norm: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    cos: torch.Tensor, sin: torch.Tensor, shape: Shape,
) -> torch.Tensor:  # fmt: skip
    """Split qkv [B, S, rows], norm and rotate; write keys and values into the caches, return queries [B, S, Hq, D]."""
    batch, seq, _ = qkv.shape
    heads, kv_heads, dim, eps, start = shape
    q, k, v = qkv.view(batch, seq, heads + 2 * kv_heads, dim).split([heads, kv_heads, kv_heads], 2)
    k_cache[:, start : start + seq] = rotate(rms_norm(k, k_norm, eps), cos, sin)
    v_cache[:, start : start + seq] = v
    return rotate(rms_norm(q, q_norm, eps), cos, sin)


def whole(layer: Layer, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Run one layer on x [B, S, H] with nothing but PyTorch, residual included."""
    batch, seq, _ = x.shape
    total = shape.start + seq
    qkv = F.linear(rms_norm(x, layer.input_norm, shape.eps), layer.qkv_proj)
    q = append(qkv, layer.q_norm, layer.k_norm, layer.k, layer.v, cos, sin, shape)
    q, k, v = (a.transpose(1, 2) for a in (q, layer.k[:, :total], layer.v[:, :total]))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=seq > 1, enable_gqa=True)
    return x + F.linear(out.transpose(1, 2).reshape(batch, seq, -1), layer.o_proj)


class Peer:
    """Layers in a chain, on any device of PyTorch's; decode adds one token to ``start`` cached ones, prefill has none.

    Parameters
    ----------
    config : AttentionConfig
        Of the model.
    batch, seq, start : int
        Sequences, new tokens of each, cached tokens.
    dtype, device : str
        PyTorch's names.
    """

    @classmethod
    def version(cls) -> str:
        """Return the version of what the peer is made of; an exception says why there is none."""
        return f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"

    def __init__(
        self, config: ca.AttentionConfig, *, batch: int, seq: int, start: int, dtype: str, device: str
    ) -> None:  # fmt: skip
        self.dtype, self.device, self.batch, self.seq = getattr(torch, dtype), device, batch, seq
        self.shape = Shape(
            config.num_attention_heads, config.num_key_value_heads, config.head_dim, float(config.rms_norm_eps), start
        )
        self.total = start + seq
        self.capacity = -(-(self.total + ROOM) // PAGE) * PAGE
        half = ca.rope_angles(config, np.arange(self.total), self.total)
        wide = (torch.from_numpy(np.concatenate([a, a], -1))[:, None] for a in half)
        self._cos, self._sin = (a.to(device=device, dtype=self.dtype) for a in wide)
        self.cos, self.sin = self._cos[start:], self._sin[start:]
        self.layers: list[Layer] = []

    @torch.no_grad()
    def add_layer(self, weights: ca.AttentionWeights, k: torch.Tensor | None, v: torch.Tensor | None) -> None:
        """Take one layer: its weights, and what it has cached, k before norm and RoPE [B, start, Hkv, D]."""
        w = {name: from_numpy(t).to(self.device) for name, t in weights.tensors().items()}
        size = (self.batch, self.capacity, self.shape.kv_heads, self.shape.dim)
        caches = [torch.zeros(size, dtype=self.dtype, device=self.device) for _ in range(2)]
        if k is not None and v is not None:
            start = self.shape.start
            for row in range(self.batch):  # one sequence at a time, so that float32 copies stay small
                normed = rms_norm(k[row : row + 1], w["k_norm"], self.shape.eps)
                caches[0][row, :start] = rotate(normed, self._cos[:start], self._sin[:start])[0]
            caches[1][:, :start] = v
        self.layers.append(Layer(*(w[name] for name in Layer._fields[:5]), *caches))

    def forward(self, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        """Return layer(x) + x."""
        raise NotImplementedError

    @torch.no_grad()
    def run(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Run every layer once; return their outputs."""
        outputs = []
        for layer in self.layers:
            x = self.forward(layer, x)
            outputs.append(x)
        return outputs


class Eager(Peer):
    """PyTorch, operation by operation."""

    def forward(self, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        """Return layer(x) + x."""
        return whole(layer, x, self.cos, self.sin, self.shape)


class Compiled(Peer):
    """The same, compiled as one function."""

    @classmethod
    def version(cls) -> str:
        """Return that of the compiler behind it."""
        return f"Triton {importlib.import_module('triton').__version__}"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._whole = torch.compile(whole, **COMPILE)

    def forward(self, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        """Return layer(x) + x."""
        return self._whole(layer, x, self.cos, self.sin, self.shape)


class Parts(Peer):
    """cuBLAS products, somebody's attention, what lies between them compiled; the residual is added by the product."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._norm, self._append = torch.compile(rms_norm, **COMPILE), torch.compile(append, **COMPILE)

    def attend(self, layer: Layer, q: torch.Tensor) -> torch.Tensor:
        """Return attention of q [B, S, Hq, D] over all tokens of the layer's caches."""
        raise NotImplementedError

    def forward(self, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        """Return layer(x) + x."""
        rows = self.batch * self.seq
        qkv = F.linear(self._norm(x, layer.input_norm, self.shape.eps), layer.qkv_proj)
        q = self._append(qkv, layer.q_norm, layer.k_norm, layer.k, layer.v, self.cos, self.sin, self.shape)
        out = self.attend(layer, q)
        return torch.addmm(x.view(rows, -1), out.reshape(rows, -1), layer.o_proj.t()).view_as(x)


class FlashAttention3(Parts):
    """cuBLAS and FlashAttention-3."""

    @classmethod
    def version(cls) -> str:
        """Return the package's."""
        importlib.import_module("fa3_fwd_interface")
        try:
            return f"fa3-fwd {importlib.metadata.version('fa3-fwd')}"
        except importlib.metadata.PackageNotFoundError:  # built by hand
            return "of unknown version"

    def attend(self, layer: Layer, q: torch.Tensor) -> torch.Tensor:
        """Return attention of q over all tokens of the layer's caches."""
        fa3 = importlib.import_module("fa3_fwd_interface")
        attention = fa3.flash_attn_with_kvcache if self.seq == 1 else fa3.flash_attn_func
        out = attention(q, layer.k[:, : self.total], layer.v[:, : self.total], causal=True)
        return out[0] if isinstance(out, tuple) else out


class FlashInfer(Parts):
    """cuBLAS and FlashInfer, its pages one after the other in each sequence's cache."""

    @classmethod
    def version(cls) -> str:
        """Return the package's."""
        return f"FlashInfer {importlib.import_module('flashinfer').__version__}"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        flashinfer = importlib.import_module("flashinfer")
        used, pages = -(-self.total // PAGE), self.capacity // PAGE

        def numbers(values: torch.Tensor) -> torch.Tensor:
            return values.to(device=self.device, dtype=torch.int32)

        starts = numbers(torch.arange(self.batch + 1) * used)
        places = numbers((torch.arange(self.batch)[:, None] * pages + torch.arange(used)).flatten())
        last = numbers(torch.full((self.batch,), self.total - (used - 1) * PAGE))
        sizes = (self.shape.heads, self.shape.kv_heads, self.shape.dim, PAGE)
        dtypes = {"q_data_type": self.dtype, "kv_data_type": self.dtype}
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=self.device)
        if self.seq == 1:
            many = self.shape.heads // self.shape.kv_heads >= TENSOR_CORE_GROUP
            self._wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=many)
            self._wrapper.plan(starts, places, last, *sizes, **dtypes)
        else:
            queries = numbers(torch.arange(self.batch + 1) * self.seq)
            self._wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
            self._wrapper.plan(queries, starts, places, last, *sizes, causal=True, **dtypes)

    def attend(self, layer: Layer, q: torch.Tensor) -> torch.Tensor:
        """Return attention of q over all tokens of the layer's caches."""
        pages = tuple(cache.view(-1, PAGE, *cache.shape[2:]) for cache in (layer.k, layer.v))
        return self._wrapper.run(q.flatten(0, 1), pages)


PEERS: dict[str, type[Peer]] = {
    "torch_eager": Eager, "torch_compile": Compiled, "fa3": FlashAttention3, "flashinfer": FlashInfer,
}  # fmt: skip


def versions() -> tuple[dict[str, str], dict[str, str]]:
    """Return the version of each peer that can be imported, and why the others cannot."""
    found, missing = {}, {}
    for name, peer in PEERS.items():
        try:
            found[name] = peer.version()
        except Exception as error:  # a wheel built for another PyTorch fails in its own ways
            missing[name] = f"{type(error).__name__}: {error}"
    if not torch.cuda.is_available():
        return {}, dict.fromkeys(PEERS, f"PyTorch {torch.__version__} sees no GPU")
    return found, missing


def captured(run: Callable[[], Any]) -> Callable[[], None]:
    """Return what queues ``run`` as one of PyTorch's CUDA graphs, after two runs outside it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # compiles, and makes room
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    torch.cuda.synchronize()
    return graph.replay


class TorchStack(Stack):
    """A peer's layers on the numbers of :class:`stacks.Stack`."""

    def __init__(self, peer_type: type[Peer], case: Case, dtype: str, layers: int) -> None:
        super().__init__(case, dtype, layers)
        self._peer = peer_type(
            case.config, batch=case.batch, seq=case.seq, start=case.cached, dtype=dtype, device="cuda"
        )
        for i in range(layers):
            earlier = map(as_tensor, self.earlier_tokens(i)) if case.cached else (None, None)
            self._peer.add_layer(layer_weights(case.model, dtype, i), *earlier)
        self._x = as_tensor(self.hidden[0])

    def run(self) -> None:
        """Run every layer once."""
        self._outputs = self._peer.run(self._x)

    def capture(self) -> None:
        """Let ``launch`` queue the run as one of PyTorch's CUDA graphs, whose outputs stay where they are."""
        self.launch = captured(self.run)
        self.hidden[1:] = [as_cupy(y, self.dtype) for y in self._outputs]


def stack_builders(names: list[str]) -> dict[str, Callable[[Case, str, int], Stack]]:
    """Return what makes the stack of each peer."""
    return {name: functools.partial(TorchStack, PEERS[name]) for name in names}


def from_numpy(array: np.ndarray) -> torch.Tensor:
    """Return a NumPy array, of bfloat16 too, as a tensor on the CPU."""
    if array.dtype.itemsize != 2:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(getattr(torch, array.dtype.name))


def as_tensor(array: Any) -> torch.Tensor:
    """Return a CuPy array of 16-bit elements as a tensor on the same memory."""
    return torch.from_dlpack(array.view(cupy.int16)).view(getattr(torch, array.dtype.name))


def as_cupy(tensor: torch.Tensor, dtype: str) -> Any:
    """Return a tensor of 16-bit elements as a CuPy array on the same memory."""
    return cupy.from_dlpack(tensor.view(torch.int16)).view(storage_dtype(dtype))


@contextlib.contextmanager
def on_stream(pointer: int) -> Iterator[None]:
    """Make a CUDA stream PyTorch's current one."""
    with torch.cuda.stream(torch.cuda.ExternalStream(pointer)):
        yield


def release() -> None:
    """Drop compiled functions and give back the memory of tensors that are gone."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
