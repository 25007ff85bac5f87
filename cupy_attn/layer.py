"""The public layer: checks a call, hands it to a backend, commits the cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from . import cuda
from .arrays import STORAGE_DTYPES, as_array, is_cupy, namespace, storage_dtype
from .cache import KVCache
from .config import AttentionConfig
from .cpu import CpuBackend
from .errors import DeviceError, InputError
from .plan import Plan, check_cache, check_hidden, check_num_tokens, check_out, check_positions
from .rope import ANGLE_DTYPES
from .weights import AttentionWeights, takes_precise_path

DEVICES = ("auto", "cuda", "cpu")


class Attention:
    """One Qwen3 attention layer: RMSNorm, QKV, per-head Q/K RMSNorm, RoPE, KV cache, GQA, output projection.

    Parameters
    ----------
    config : AttentionConfig or mapping
        Or a parsed ``config.json``.
    weights : AttentionWeights or mapping
        Or arrays under their checkpoint names.
    dtype : str or dtype
        Storage dtype of weights, cache, input and output: float16, bfloat16 or float32. Sums, norms, angles and
        softmax are at least float32 whatever it is.
    device : {"auto", "cuda", "cpu"}
        ``auto``: the GPU if there is a usable one, else the CPU.
    layer : int, optional
        Index of the layer, where ``weights`` is a mapping; default 0.
    angles : {"float64", "float32"}
        Precision of the rotary angles. float32 is what transformers computes: ask for it to compare long contexts.
    batch_invariant : bool
        Whether a sequence's output must have the same bits whichever sequences, and however many, share the batch. Its
        own calls still matter: a prompt in other chunks is summed up in another order. Costs time on the GPU where
        sequences are few or many (docs/performance.md).

    Raises
    ------
    ConfigError, WeightsError
        The config or the weights are not usable; or ``batch_invariant`` without a kernel for them on the GPU.
    DeviceError
        ``device="cuda"`` without a usable GPU.

    Examples
    --------
    >>> import numpy as np, cupy_attn as ca
    >>> config = ca.AttentionConfig.from_dict(
    ...     {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rope_theta": 1e6}
    ... )
    >>> rng = np.random.default_rng(0)
    >>> shapes = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64)}
    >>> weights = {f"self_attn.{n}.weight": rng.standard_normal(s, np.float32) / 8 for n, s in shapes.items()}
    >>> weights |= {f"self_attn.{n}_norm.weight": np.ones(16, np.float32) for n in "qk"}
    >>> weights["input_layernorm.weight"] = np.ones(64, np.float32)
    >>> layer = ca.Attention(config, weights, dtype="float32", device="cpu")
    >>> cache = layer.new_cache(batch=1, capacity=16)
    >>> layer(np.ones((1, 5, 64), np.float32), cache).shape, layer(np.ones((1, 1, 64), np.float32), cache).shape
    ((1, 5, 64), (1, 1, 64))
    >>> cache.lengths.tolist()
    [6]
    """

    def __init__(
        self,
        config: AttentionConfig | Mapping[str, Any],
        weights: AttentionWeights | Mapping[str, Any],
        dtype: Any = "float16",
        device: str = "auto",
        *,
        layer: int | None = None,
        angles: str = "float64",
        batch_invariant: bool = False,
    ) -> None:
        self.config = config if isinstance(config, AttentionConfig) else AttentionConfig.from_dict(config)
        self.dtype = storage_dtype(dtype)
        if isinstance(weights, AttentionWeights):
            if layer not in (None, weights.layer):
                raise InputError(f"layer is {layer}, the weights are of layer {weights.layer}; leave layer out.")
        else:
            weights = AttentionWeights.from_dict(weights, self.config, layer=layer or 0)
        weights.check(self.config)
        self.weights = weights.astype(self.dtype)
        self.layer = weights.layer
        self.sliding_window = self.config.window(self.layer)
        if angles not in ANGLE_DTYPES:
            raise InputError(f"angles is {angles!r}; it must be one of {', '.join(ANGLE_DTYPES)}.")
        if device not in DEVICES:
            raise InputError(f"device is {device!r}; it must be one of {', '.join(DEVICES)}.")
        problem = None if device == "cpu" else cuda.problem()
        if device == "cuda" and problem:
            raise DeviceError(problem)
        on_gpu = device != "cpu" and not problem
        backend = cuda.CudaBackend if on_gpu else CpuBackend
        self.batch_invariant = bool(batch_invariant)
        self._backend: Any = backend(self.config, self.weights, angles=angles, batch_invariant=self.batch_invariant)
        self.device: str = self._backend.name

    def __repr__(self) -> str:
        c = self.config
        return (
            f"Attention(layer={self.layer}, hidden_size={c.hidden_size}, heads={c.num_attention_heads}:"
            f"{c.num_key_value_heads}, head_dim={c.head_dim}, dtype={self.dtype}, device={self.device!r})"
        )

    @property
    def precise(self) -> bool:
        """Whether scores are so large that the GPU kernels compute them with split products; the CPU has float32.

        See :func:`weights.takes_precise_path`.
        """
        return takes_precise_path(self.config, self.weights.q_norm, self.weights.k_norm)

    def new_cache(self, batch: int = 1, capacity: int | None = None) -> KVCache:
        """Return an empty cache for this layer.

        Parameters
        ----------
        batch : int
            B, sequences decoded together.
        capacity : int, optional
            Most tokens a sequence can hold; default ``config.max_position``. Costs
            ``2 * batch * capacity * Hkv * D`` elements, and on the CPU half as many in float32 for rotated keys.
        """
        if capacity is None:
            capacity = self.config.max_position
        return KVCache(self.config, self.layer, batch=batch, capacity=capacity, dtype=self.dtype, xp=self._backend.xp)

    def __call__(
        self,
        x: Any,
        cache: KVCache | None = None,
        *,
        positions: Any = None,
        residual: Any = None,
        out: Any = None,
        stages: dict[str, Any] | None = None,
        num_tokens: Any = None,
    ) -> Any:
        """Run the layer on S new tokens of B sequences and append them to the cache.

        Parameters
        ----------
        x : array [B, S, H]
            Hidden states entering the layer, of the layer's dtype; NumPy, CuPy, or anything with ``__dlpack__``.
            NaN and Inf are not looked for; they spread as in any array code.
        cache : KVCache, optional
            From :meth:`new_cache`. Without one the tokens see only each other.
        positions : array_like of int [S] or [B, S], optional
            Absolute positions, increasing along a sequence and past those in the cache; gaps are allowed.
            Default: counting on from the cache.
        residual : array [B, S, H], optional
            Added to the output before it is rounded (pass ``x`` for a decoder layer's first half).
        out : array [B, S, H], optional
            Written and returned instead of a new array; may be x or residual itself.
        stages : dict, optional
            Filled with intermediates by name: ``reference.STAGES`` less ``scores`` and ``probs``, float32.
        num_tokens : array_like of int [B], optional
            How many of the S rows belong to each sequence; the rest is padding on the right, which is neither
            cached nor seen, and zero in the output. Default: all.

        Returns
        -------
        array [B, S, H]
            Of the layer's dtype; a NumPy array for NumPy or other host input, a CuPy array for device input.

        Raises
        ------
        InputError
            A wrong shape, dtype, device or position; nothing is written.
        CacheError
            The cache is too small, or of another layer, config, batch or device; nothing is written.
        """
        if cache is not None and positions is None and stages is None and num_tokens is None and self.device == "cuda":
            y = self._backend.step(x, cache, residual, out) if isinstance(cache, KVCache) else None
            if y is not None:
                return y
        config, xp = self.config, self._backend.xp
        x = check_hidden("x", x, self.dtype, (None, None, config.hidden_size))
        on_gpu = is_cupy(x)
        if on_gpu and xp is np:
            raise InputError("x is on the GPU and the layer on the CPU; make the layer with device='cuda'.")
        batch, seq = x.shape[:2]
        if residual is not None:
            residual = check_hidden("residual", residual, self.dtype, x.shape)
            if is_cupy(residual) != on_gpu:
                raise InputError("residual and x are on different devices; move one of them.")
        if out is not None:
            out = check_out(out, x, self.dtype)
        if stages is not None and not isinstance(stages, dict):
            raise InputError(f"stages is a {type(stages).__name__}; pass a dict to be filled.")
        counts = check_num_tokens(num_tokens, batch, seq)
        capturing = xp is not np and xp.cuda.get_current_stream().is_capturing()
        if capturing:
            self._check_capturable(on_gpu=on_gpu, cache=cache, given=[positions, num_tokens, stages])
        if cache is None:
            cache = self.new_cache(batch, seq)
        else:
            check_cache(cache, config, self.layer, self.dtype, batch, xp)
            cache.refresh()
        given = check_positions(positions, config, cache, counts, seq)
        cache.check_room(counts)

        if xp is not np and not on_gpu:
            x, residual = xp.asarray(x), None if residual is None else xp.asarray(residual)
        target = out if on_gpu else None
        plan = Plan(x, residual, given, counts, self.dtype, stages, target, positions is None, num_tokens is None)
        y = self._backend.forward(plan, cache)
        if capturing:
            cache.mark_captured()  # nothing has run: the graph's replays append
        else:
            cache.commit(given, counts)  # last: a call that fails or is interrupted leaves the cache as it was
        if xp is not np and not on_gpu:
            y = xp.asnumpy(y)
        if out is None:
            return y
        if y is not out:
            out[...] = y
        return out

    def _check_capturable(self, *, on_gpu: bool, cache: KVCache | None, given: list[Any]) -> None:
        """Raise InputError unless a call needs nothing from the host, which a graph's replays would not ask again."""
        if not on_gpu:
            raise InputError("x is in host memory while the stream is being captured; pass a CuPy array.")
        if cache is None:
            raise InputError("cache is missing while the stream is being captured; pass one, a graph cannot make it.")
        if any(value is not None for value in given):
            raise InputError(
                "positions, num_tokens and stages cannot be given while the stream is being captured: a replay would "
                "repeat them; leave them out and tokens count on from the cache."
            )


def forward(
    hidden_states: Any,
    config_params: AttentionConfig | Mapping[str, Any],
    weights: AttentionWeights | Mapping[str, Any],
    *,
    layer: int | None = None,
    cache: KVCache | None = None,
    positions: Any = None,
    residual: Any = None,
    out: Any = None,
    stages: dict[str, Any] | None = None,
    num_tokens: Any = None,
    dtype: Any = None,
    device: str = "auto",
    angles: str = "float64",
) -> Any:
    """Run one attention layer in one call, from a ``config.json`` dict and a dict of checkpoint tensors.

    Builds an :class:`Attention` and calls it; keep the layer yourself to call it again, since building converts
    every weight. For a cache, use :meth:`Attention.new_cache`.

    Parameters
    ----------
    hidden_states : array [B, S, H]
        Float16, bfloat16 or float32; NumPy, CuPy or DLPack.
    config_params : mapping or AttentionConfig
        A parsed ``config.json``.
    weights : mapping or AttentionWeights
        Arrays under their checkpoint names; see :meth:`AttentionWeights.from_dict`.
    layer : int, optional
        Index of the layer in ``weights``; default 0.
    cache, positions, residual, out, stages, num_tokens
        As in :meth:`Attention.__call__`.
    dtype : str or dtype, optional
        Storage dtype; default that of ``hidden_states``.
    device, angles
        As in :class:`Attention`.

    Returns
    -------
    array [B, S, H]
        Of dtype ``dtype``.
    """
    x = as_array("hidden_states", hidden_states)
    if dtype is None and str(x.dtype) not in STORAGE_DTYPES:
        raise InputError(f"hidden_states is {x.dtype}; convert it to one of {', '.join(STORAGE_DTYPES)}.")
    target = storage_dtype(x.dtype if dtype is None else dtype)
    x = _converted("hidden_states", x, target)
    residual = None if residual is None else _converted("residual", as_array("residual", residual), target)
    attention = Attention(config_params, weights, target, device, layer=layer, angles=angles)
    return attention(x, cache, positions=positions, residual=residual, out=out, stages=stages, num_tokens=num_tokens)


def _converted(name: str, x: Any, target: np.dtype[Any]) -> Any:
    """Return x in another dtype; values that are finite must stay so."""
    if x.dtype == target:
        return x
    xp = namespace(x)
    with np.errstate(over="ignore"):
        converted = x.astype(target)
    if bool((xp.isfinite(x.astype(np.float64)) & ~xp.isfinite(converted.astype(np.float64))).any()):
        raise InputError(f"{name} holds values too large for {target}; use dtype bfloat16 or float32.")
    return converted
