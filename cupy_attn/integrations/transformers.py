"""The attention half of a transformers Qwen3 model's decoder layers, replaced by this package's layer.

>>> from cupy_attn.integrations.transformers import patch, unpatch  # doctest: +SKIP
>>> patch(model, capacity=2048)  # doctest: +SKIP
>>> model.generate(**inputs, max_new_tokens=64)  # doctest: +SKIP
>>> unpatch(model)  # doctest: +SKIP

Hidden states pass without a copy, on PyTorch's current stream; keys and values lie in a
:class:`~cupy_attn.KVCache`, before normalisation, inside the cache object that transformers hands around. Needs the hf
extra.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..arrays import STORAGE_DTYPES, storage_dtype
from ..cache import KVCache
from ..config import AttentionConfig
from ..errors import CacheError, InputError
from ..layer import Attention
from ..weights import AttentionWeights

try:
    import torch
    from transformers.cache_utils import CacheLayerMixin
except ImportError as error:
    raise ImportError(
        f"cupy_attn.integrations.transformers misses a library ({error}); pip install 'cupy-attn[hf]'."
    ) from None

DECODER_LAYERS = ("Qwen3DecoderLayer", "Qwen3MoeDecoderLayer")
CACHE_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer")
PATCH = "_cupy_attn_patch"  # attribute of a patched base model
CAPACITY = 4096  # tokens, by default


def patch(model: Any, *, capacity: int | None = None) -> None:
    """Let a model's decoder layers compute norm, attention and residual with this package.

    Weights are converted once and kept beside the model's own. For inference: greedy search and sampling, prompts of
    unequal lengths (an ``attention_mask`` of zeros and ones), several calls on one ``DynamicCache``.

    Parameters
    ----------
    model : PreTrainedModel
        ``Qwen3ForCausalLM``, ``Qwen3MoeForCausalLM`` or their base model, on the CPU or on one GPU, in float16,
        bfloat16 or float32.
    capacity : int, optional
        Most tokens of a sequence that a cache can hold; default 4096, or the model's positions if fewer. A cache takes
        ``2 * batch * capacity * num_key_value_heads * head_dim`` elements a layer.

    Raises
    ------
    InputError
        Not such a model, it is patched already, or capacity is not an integer from 1 to the model's positions.
    """
    base = _base(model)
    if hasattr(base, PATCH):
        raise InputError("the model is patched already; unpatch it first to change the capacity.")
    config = AttentionConfig.from_dict(base.config.to_dict())
    most = config.max_position
    capacity = min(CAPACITY, most) if capacity is None else capacity
    if isinstance(capacity, bool) or not isinstance(capacity, int | np.integer) or not 1 <= capacity <= most:
        raise InputError(f"capacity is {capacity!r}; it must be an integer from 1 to {most}, the model's positions.")
    setattr(base, PATCH, _Patch(base, config, int(capacity)))


def unpatch(model: Any) -> None:
    """Give a model its own attention back; caches filled meanwhile cannot be used any more.

    Raises
    ------
    InputError
        The model is not patched.
    """
    base = _base(model)
    if not hasattr(base, PATCH):
        raise InputError("the model is not patched; there is nothing to undo.")
    getattr(base, PATCH).undo()
    delattr(base, PATCH)


def _base(model: Any) -> Any:
    """Return the module that holds the decoder layers."""
    base = getattr(model, "model", model)
    layers = getattr(base, "layers", ())
    kinds = sorted({type(layer).__name__ for layer in layers})
    if not kinds or not set(kinds) <= set(DECODER_LAYERS):
        found = f"its layers are {', '.join(kinds)}" if kinds else "it has no decoder layers"
        raise InputError(f"model is a {type(model).__name__} ({found}); pass a transformers Qwen3 or Qwen3-MoE model.")
    return base


class _Patch:
    """What a patched model carries: hooks and replaced methods, and what the current call was given."""

    def __init__(self, base: Any, config: AttentionConfig, capacity: int) -> None:
        self.capacity = capacity
        self._base = base
        layers = [_attention(layer, config, index) for index, layer in enumerate(base.layers)]
        self._hook = base.register_forward_pre_hook(self._begin, with_kwargs=True)
        self._step = _Step(None)
        for decoder, layer in zip(base.layers, layers, strict=True):
            decoder.forward = functools.partial(self._forward, decoder, layer)

    def undo(self) -> None:
        self._hook.remove()
        for decoder in self._base.layers:
            del decoder.forward

    def _begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for cache in args[3:4] or (kwargs.get("cache"), kwargs.get("past_key_values")):
            if cache is not None:  # before the mask, which transformers makes to fit the cache
                _check_kind(cache)
        self._step = _Step(args[1] if len(args) > 1 else kwargs.get("attention_mask"))

    def _forward(
        self, decoder: Any, layer: Attention, hidden_states: Any, *, position_ids: Any = None,
        past_key_values: Any = None, cache: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Stand in for a decoder layer's ``forward``; ``past_key_values`` is ``cache`` from transformers 5.24 on."""
        past_key_values = past_key_values if cache is None else cache
        if kwargs.get("output_attentions"):
            raise InputError("output_attentions is set; a patched model does not keep attention weights, unpatch it.")
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            raise InputError("gradients are on; call a patched model under torch.no_grad() or torch.inference_mode().")
        with _current_stream(hidden_states):
            entry = None if past_key_values is None else self._entry(past_key_values, layer, len(hidden_states))
            step = self._step
            step.prepare(layer, hidden_states, position_ids, None if entry is None else entry.cache)
            x = step.align(hidden_states.contiguous())
            y = torch.empty_like(x)
            array, out = _on_gpu(x), _on_gpu(y)
            layer(array, None if entry is None else entry.cache, positions=step.positions,
                  num_tokens=step.num_tokens, residual=array, out=out)  # fmt: skip
            hidden_states = step.scatter(y, hidden_states)
            if entry is not None:
                entry.seen += x.shape[1]
        outcome = decoder.mlp(decoder.post_attention_layernorm(hidden_states))
        return hidden_states + (outcome[0] if isinstance(outcome, tuple) else outcome)

    def _entry(self, cache: Any, layer: Attention, batch: int) -> _CacheLayer:
        """Return our layer of a cache, put there when it is empty."""
        entries = cache.layers
        if len(entries) == layer.layer:  # a cache made without a config grows layer by layer
            entries.append(_CacheLayer(layer.new_cache(batch, self.capacity)))
        entry = entries[layer.layer]
        if isinstance(entry, _CacheLayer):
            return entry
        if entry.get_seq_length() > 0:
            count = entry.get_seq_length()
            raise CacheError(
                f"the cache holds {count} tokens from before the model was patched; start with an empty one."
            )
        entries[layer.layer] = _CacheLayer(layer.new_cache(batch, self.capacity))
        return entries[layer.layer]


def _check_kind(cache: Any) -> None:
    """Raise CacheError unless a cache is one whose layers can be replaced by ours, or were."""
    entries = getattr(cache, "layers", None)
    if entries is None:
        raise CacheError(f"past_key_values is a {type(cache).__name__}; pass a DynamicCache, or none.")
    for entry in entries:
        if not isinstance(entry, _CacheLayer) and type(entry).__name__ not in CACHE_LAYERS:
            raise CacheError(f"the cache holds a {type(entry).__name__}; use a DynamicCache with a patched model.")


def _attention(decoder: Any, config: AttentionConfig, index: int) -> Attention:
    """Return a layer with a decoder layer's weights, where they are."""
    tensors = {
        name: tensor.detach().cpu()
        for name, tensor in decoder.state_dict().items()
        if name.startswith(("self_attn.", "input_layernorm."))
    }
    first = decoder.self_attn.q_proj.weight
    dtype = str(first.dtype).removeprefix("torch.")
    if dtype not in STORAGE_DTYPES:
        raise InputError(f"the model's dtype is {dtype}; convert it to one of {', '.join(STORAGE_DTYPES)}.")
    with _current_stream(first):
        weights = AttentionWeights.from_dict(tensors, config, layer=index)
        return Attention(config, weights, dtype, first.device.type)


def _on_gpu(tensor: torch.Tensor) -> Any:
    """Return a contiguous tensor on a GPU as a CuPy array of the same memory, any other as it is.

    What DLPack does, without a capsule and its checks: at batch 1 a patched layer is bound by the host.
    """
    if not tensor.is_cuda:
        return tensor
    import cupy

    memory = cupy.cuda.UnownedMemory(tensor.data_ptr(), tensor.nbytes, tensor, tensor.device.index)
    return cupy.ndarray(tuple(tensor.shape), _numpy_dtype(tensor.dtype), cupy.cuda.MemoryPointer(memory, 0))


@functools.cache
def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    return storage_dtype(dtype)


@contextlib.contextmanager
def _current_stream(tensor: torch.Tensor) -> Iterator[None]:
    """Make PyTorch's current stream CuPy's, on the tensor's GPU."""
    if not tensor.is_cuda:
        yield
        return
    import cupy

    index = tensor.device.index
    with cupy.cuda.Device(index), _stream(torch.cuda.current_stream(index).cuda_stream, index):
        yield


@functools.lru_cache(maxsize=64)  # PyTorch has a few tens of streams a GPU, and reuses them
def _stream(handle: int, device: int) -> Any:
    """Return a PyTorch stream as CuPy's."""
    import cupy

    return cupy.cuda.Stream.from_external(_Stream(handle))


class _Stream:
    """A stream by the CUDA stream protocol, which PyTorch's lack in older versions."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


class _Step:
    """One call of the model: which of its columns are tokens, and where they are.

    transformers pads on the left, or anywhere; a layer here takes a sequence's tokens first and padding after them.

    Parameters
    ----------
    attention_mask : tensor [B, T] or None
        Zeros and ones, of cached and new columns.
    """

    def __init__(self, attention_mask: Any) -> None:
        if attention_mask is not None and (not torch.is_tensor(attention_mask) or attention_mask.ndim != 2):
            shape = list(attention_mask.shape) if torch.is_tensor(attention_mask) else type(attention_mask).__name__
            raise InputError(f"attention_mask is {shape}; a patched model takes zeros and ones [batch, tokens] only.")
        self._mask = attention_mask
        self._order: Any = None  # [B, S], tokens first
        self._ready = False
        self.positions: np.ndarray | None = None
        self.num_tokens: np.ndarray | None = None

    def prepare(self, layer: Attention, hidden_states: Any, position_ids: Any, cache: KVCache | None) -> None:
        """Work out columns and positions; all layers of a call share them."""
        if self._ready:
            return
        batch, seq = hidden_states.shape[:2]
        here = f"{hidden_states.dtype} on {hidden_states.device.type}".removeprefix("torch.")
        there = f"{layer.dtype} on {layer.device}"
        if here != there:
            raise InputError(f"the model is {here} and was patched as {there}; unpatch it and patch it again.")
        if cache is not None and cache.batch != batch:
            raise CacheError(
                f"the cache is of batch {cache.batch}, the call of batch {batch}; start with an empty one."
            )
        cached = np.zeros(batch, np.int64) if cache is None else cache.lengths
        positions = None if position_ids is None else np.broadcast_to(position_ids.cpu().numpy(), (batch, seq))
        if self._mask is not None:
            mask = self._mask.cpu().numpy() != 0
            new = mask[:, -seq:]
            if new.shape != (batch, seq):
                raise InputError(f"attention_mask has shape {list(mask.shape)}, for hidden states [{batch}, {seq}].")
            hidden = np.flatnonzero(mask[:, :-seq].sum(1) != cached)
            if hidden.size:
                b = int(hidden[0])
                raise InputError(
                    f"attention_mask shows {mask[b, :-seq].sum()} earlier tokens of sequence {b}, its cache holds "
                    f"{cached[b]}; show all that are cached."
                )
            if not new.all():
                order = np.argsort(~new, axis=1, kind="stable")
                self.num_tokens = new.sum(1)
                self._order = torch.from_numpy(order).to(hidden_states.device)[:, :, None]
                positions = None if positions is None else np.take_along_axis(positions, order, 1)
        if positions is not None:
            start = np.zeros(batch, np.int64) if cache is None else cache.next_positions()
            same = positions == start[:, None] + np.arange(seq)
            if self.num_tokens is not None:
                same |= np.arange(seq) >= self.num_tokens[:, None]
            if not same.all():
                self.positions = np.ascontiguousarray(positions)
        if cache is not None:
            most = int((cached + (seq if self.num_tokens is None else self.num_tokens)).max())
            if cache.capacity < most <= cache.config.max_position:  # past the positions no capacity would help
                raise CacheError(
                    f"a sequence of {most} tokens does not fit capacity {cache.capacity}; unpatch, then patch the "
                    f"model with capacity >= {most} and start with an empty cache."
                )
        self._ready = True

    def align(self, hidden_states: Any) -> Any:
        """Return hidden states [B, S, H] with a sequence's tokens first."""
        if self._order is None:
            return hidden_states
        return torch.gather(hidden_states, 1, self._order.expand_as(hidden_states))

    def scatter(self, y: Any, hidden_states: Any) -> Any:
        """Return y with every token back in its column."""
        if self._order is None:
            return y
        return torch.empty_like(y).scatter_(1, self._order.expand_as(y), y)


class _CacheLayer(CacheLayerMixin):
    """A layer of a transformers cache that keeps its tokens in a :class:`KVCache`.

    Parameters
    ----------
    cache : KVCache
        Empty.
    """

    def __init__(self, cache: KVCache) -> None:
        super().__init__()
        self.cache = cache
        self.seen = 0  # columns, padding included
        self.is_initialized = True

    def get_seq_length(self, *args: Any) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        count = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.seen + count, 0

    def get_max_length(self) -> int:
        return self.cache.capacity

    def get_max_cache_shape(self) -> int:
        return self.cache.capacity

    def reset(self) -> None:
        self.cache.reset()
        self.seen = 0

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise CacheError(
            "beam search, assisted generation and offloading rearrange a cache, which that of a patched model does not "
            "allow; use greedy search or sampling, or unpatch the model."
        )

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse what only a model's own attention asks for."""
        raise CacheError("a patched model filled this cache, which one that is not patched cannot read; start with an "
                         "empty one.")  # fmt: skip

    lazy_initialization = reorder_cache = crop = batch_repeat_interleave = batch_select_indices = _refuse
    offload = prefetch = _refuse
