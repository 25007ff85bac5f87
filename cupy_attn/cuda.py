"""The CUDA backend: weights made ready once, then each call planned, given scratch and launched."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from . import kernels, launch, launch_decode, wgmma
from .cache import KVCache
from .config import AttentionConfig
from .errors import ConfigError, InputError, SlowPathWarning
from .kernels import Macros
from .launch import CALL, Launch, Limits, Shape
from .launcher import Launcher
from .operands import Operands, has_close_scores
from .plan import Plan
from .separate import SeparateOps
from .steps import Step
from .tensor_maps import MAP_BYTES, tensor_map
from .weights import AttentionWeights, multiplies_rest, takes_precise_path
from .workspace import workspace_of

MIN_CAPABILITY = (8, 0)
PREFILL_STAGES = (
    "input_norm", "q", "k", "v", "q_norm", "k_norm", "q_rope", "k_rope", "row_max", "lse", "attention", "output",
)  # fmt: skip
NOTE_WORDS = 4  # of call.cuh's struct Note
# Sequences and tokens of each for which decode kernels are listed: most kinds.
DECODES = ((1, 1), (2, 1), (4, 1), (8, 1), (12, 1), (64, 1), (1, 2), (1, 16))
# Bytes of weights and cache of a decode step that an H200 is done with before the host has launched three kernels.
SHORT_STEP = 24 << 20
# Fields of the call that a tensor map is made of.
MAPPED = (
    "x", "hidden", "qkv_proj", "folded_proj", "k_proj", "q", "k", "v", "v_cache", "attention", "o_proj", "batch", "seq",
    "capacity", "scratch_capacity",
)  # fmt: skip


@functools.cache
def problem() -> str | None:
    """Return why no GPU is usable, as a sentence, or None if one is."""
    try:
        cupy = kernels.import_cupy()
    except ImportError as error:
        return f"CuPy cannot be imported ({error}); pip install cupy-cuda12x."
    except OSError as error:  # it makes its cache folder when imported
        return f"CuPy cannot be imported ({error}); set CUPY_CACHE_DIR to a folder that can be written."
    try:
        if not cupy.cuda.runtime.getDeviceCount():
            return "no CUDA GPU is visible; use device='cpu' or check CUDA_VISIBLE_DEVICES."
        device = cupy.cuda.Device()
        capability = divmod(int(device.compute_capability), 10)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no CUDA GPU is usable ({error}); use device='cpu' or install the NVIDIA driver."
    if capability < MIN_CAPABILITY:
        return (
            f"the GPU has compute capability {capability[0]}.{capability[1]}, the kernels need "
            f"{MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}; use device='cpu'."
        )
    return None


@functools.cache
def limits(device_id: int) -> Limits:
    """Return what a GPU offers to the kernels."""
    import cupy

    attributes = cupy.cuda.Device(device_id).attributes
    return Limits(
        num_sms=attributes["MultiProcessorCount"],
        block_smem=attributes["MaxSharedMemoryPerBlockOptin"],
        sm_smem=attributes["MaxSharedMemoryPerMultiprocessor"],
        wgmma=wgmma.is_wanted() and kernels.runs_wgmma(kernels.current_arch()),
    )


H200 = Limits(num_sms=132, block_smem=232448, sm_smem=233472, wgmma=True)
"""What specialisations are listed for where there is no GPU."""


def specialisations(
    config: AttentionConfig, dtype: np.dtype[Any], *, precise: bool, windowed: bool = False
) -> list[tuple[str, Macros]]:
    """Return every kernel that a layer of a config needs, in a storage dtype, on the precise or the normal path."""
    if launch.supported(config, dtype.name) is not None:
        return []
    gpu, decoding = H200, [H200, dataclasses.replace(H200, wgmma=False)]
    if problem() is None:
        import cupy

        gpu = limits(cupy.cuda.Device().id)
        decoding = [gpu]
    shape = Shape(dtype.name, config.head_dim, precise, windowed, float32_angles=False)
    close = dataclasses.replace(shape, close_scores=True)
    shapes = [shape, close]
    if not precise:
        shapes.append(dataclasses.replace(close, half_turns=True, folded=wgmma.can_fold(config, shape, gpu)))
    # Rows of many prompts: what tiles a product takes goes by how they fill the GPU.
    prompts = [(gpu, rows) for n in range(17) for rows in (1 << n, 3 << n)]
    if gpu.wgmma:  # few tokens and stages still take the kernels of other GPUs
        prompts += [(dataclasses.replace(gpu, wgmma=False), rows) for rows in (1, 1 << 16)]
    launches = [
        *(
            one
            for offered, rows in prompts
            for each in shapes
            for one in wgmma.prefill(config, each, offered, 1, rows, past_tiles=0, collect=False)
        ),
        *(
            one
            for offered in decoding
            for batch, seq in DECODES
            for each in shapes
            for one in wgmma.decode(config, each, offered, batch, seq)
        ),
    ]
    return list(dict.fromkeys((one.name, one.macros) for one in launches))


class CudaBackend:
    """One layer on the current GPU.

    Parameters
    ----------
    config : AttentionConfig
        Shapes and numerics.
    weights : AttentionWeights
        In the storage dtype.
    angles : {"float64", "float32"}
        Precision of the rotary angles.
    batch_invariant : bool
        Let no kernel's order of sums depend on the batch.

    Raises
    ------
    ConfigError
        ``batch_invariant``, and there is no kernel for this layer.

    Warns
    -----
    SlowPathWarning
        There is no kernel for this layer: it runs as separate array operations.
    """

    name = "cuda"

    def __init__(
        self, config: AttentionConfig, weights: AttentionWeights, *, angles: str, batch_invariant: bool = False
    ) -> None:
        import cupy

        self.xp = cupy
        self._config, self._host_weights, self._angles = config, weights, angles
        self._device = cupy.cuda.Device().id
        self._limits = limits(self._device)
        self._window = config.window(weights.layer)
        self._shape = Shape(
            dtype=weights.dtype.name,
            head_dim=config.head_dim,
            precise=takes_precise_path(config, weights.q_norm, weights.k_norm),
            windowed=self._window is not None,
            float32_angles=angles == "float32",
            batch_invariant=batch_invariant,
        )
        why = launch.supported(config, weights.dtype.name)
        if why is None and batch_invariant and not launch.holds_a_row(config, self._limits):
            raise ConfigError(
                f"batch_invariant keeps a row of x in shared memory, and hidden_size {config.hidden_size} does not fit "
                f"this GPU's {self._limits.block_smem} bytes; leave batch_invariant out."
            )
        if why is not None and batch_invariant:
            raise ConfigError(
                f"batch_invariant needs the kernels, and there is none for layer {weights.layer}, because {why}; "
                "use float16 or bfloat16 storage and such a shape, or leave batch_invariant out."
            )
        if why is not None:
            warnings.warn(
                f"layer {weights.layer} runs as separate array operations, many times slower than the kernels, because "
                f"{why}; use float16 or bfloat16 storage and such a shape if you can.",
                SlowPathWarning,
                stacklevel=4,
            )
        rest = wgmma.can_multiply_rest(self._shape, self._limits)
        rest = rest and multiplies_rest(config, weights.q_norm, weights.k_norm)
        folded = why is None and not rest and wgmma.can_fold(config, self._shape, self._limits)
        close = has_close_scores(config, weights, angles=angles)
        small = not (self._shape.precise or multiplies_rest(config, weights.q_norm, weights.k_norm))
        self._shape = dataclasses.replace(self._shape, folded=folded, close_scores=close, half_turns=small)
        self._ready = None
        if why is None:
            self._ready = Operands(config, weights, angles=angles, multiplies_rest=rest, folded=folded)
        self._launches: dict[Any, list[Launch]] = {}
        self._launchers: dict[Launch, Launcher] = {}
        self._call = np.zeros(1, CALL)
        if self._ready is not None:
            self._set(**self._ready.pointers(), **self._ready.scalars, hidden_size=config.hidden_size,
                      num_q_heads=config.num_attention_heads, num_kv_heads=config.num_key_value_heads,
                      group=config.group, max_position=config.lasting_positions, window=self._window or 0,
                      eps=config.rms_norm_eps)  # fmt: skip

    @functools.cached_property
    def _separate(self) -> SeparateOps:
        return SeparateOps(self._config, self._host_weights, angles=self._angles)

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            self._call[name] = value

    def forward(self, plan: Plan, cache: KVCache) -> Any:
        """Run one planned call: write K and V past the cached tokens, return y [B, S, H] in the storage dtype."""
        cache.step = None
        self._check_device()
        capturing = self.xp.cuda.get_current_stream().is_capturing()
        if self._ready is None or self._outgrown(plan):
            if self._shape.batch_invariant:
                raise InputError(
                    f"positions reach {int(plan.positions.max())}, where dynamic RoPE changes the angles and this "
                    "layer runs as separate array operations, which are not batch-invariant; leave batch_invariant out."
                )
            if capturing:
                raise InputError(
                    "this layer runs as separate array operations, which a graph cannot hold; call it outside."
                )
            return self._separate.forward(plan, cache)
        decode = plan.stages is None and launch_decode.decodes(self._config, self._shape, plan.batch, plan.seq)
        past = 0 if decode else int(cache.lengths.max())
        if capturing and not decode:
            past = cache.capacity  # replays will find more
        past_tiles = -(-past // launch.PAST_ROWS)
        key = (plan.batch, plan.seq, past_tiles, decode, plan.stages is not None)
        launches = self._launches.get(key)
        if launches is None:
            launches = self._launches[key] = self._plan_launches(plan, past_tiles, decode=decode)
        scratch = cache.capacity if capturing else min(cache.capacity, _bucket(past + plan.seq))
        y, keep = self._prepare(plan, cache, launches, scratch, past_tiles, capturing=capturing, decode=decode)
        stream, call = self.xp.cuda.get_current_stream(), self._call.copy()
        maps = [self._maps(one, call) for one in launches]

        def bind(to: Any) -> list[Callable[[], None]]:
            return [self._launcher(one).bind(call, to, its) for one, its in zip(launches, maps, strict=True)]

        bound = bind(stream)
        try:
            for run in bound:
                run()
        except BaseException:
            # It takes the last kernel to make notes old. While a graph is captured nothing has run.
            with contextlib.suppress(RuntimeError):  # a GPU that fails is told of by what failed first
                if not capturing:
                    workspace_of(self._device, stream.ptr).clear("notes")
            raise
        del keep
        if decode and plan.seq == 1 and plan.counting_on and plan.unpadded and not capturing and not cache.captured:
            tokens = [(mapped, box_rows) for one, mapped in zip(launches, maps, strict=True)
                      for name, box_rows in one.boxes[:1] if name == "tokens"]  # fmt: skip

            def map_x(address: int) -> None:
                for mapped, box_rows in tokens:
                    mapped[:MAP_BYTES] = tensor_map(address, self._config.hidden_size, plan.batch, box_rows)

            cache.step = Step(self, call, bind, bound, stream.ptr, workspace_of(self._device, stream.ptr), y.shape,
                              y.dtype, map_x, self._room(plan, cache), self._short(plan, cache))  # fmt: skip
        return y

    def step(self, x: Any, cache: KVCache, residual: Any, out: Any) -> Any:
        """Run the step that a cache has ready, with other arrays, and return y; None where that cannot be.

        It repeats the last call on the cache, if that was of one token a sequence, counting on: all that was checked
        then still holds, but for the arrays. It takes a tenth of the time that planning a call does.
        """
        step, xp = cache.step, self.xp
        if step is None:
            return None
        stream = xp.cuda.get_current_stream()
        if not step.serves(self, stream.ptr) or stream.is_capturing():
            return None
        self._check_device()
        if not step.repeats(x, residual, out):
            if not step.takes(x, xp.ndarray):
                return None
            if residual is not None and residual is not x and not step.takes(residual, xp.ndarray):
                return None
            if out is None:
                out = xp.empty(step.shape, step.dtype)
            elif not step.takes(out, xp.ndarray) or not _writable_in_place(out, residual):
                return None
            step.use(x, residual, out)
        cache.step = None  # until all of it is done: an interrupt must not leave half a step to be repeated
        step.launch(stream)
        cache.count_step()
        cache.step = step
        return out

    def _check_device(self) -> None:
        """Raise InputError unless the layer's GPU is the current one: null streams of two look alike."""
        current = self.xp.cuda.runtime.getDevice()
        if current != self._device:
            raise InputError(
                f"the layer was made on GPU {self._device} and GPU {current} is the current one; call it within "
                f"cupy.cuda.Device({self._device})."
            )

    def _room(self, plan: Plan, cache: KVCache) -> int:
        """Return for how many more tokens, after a planned one, there is room in every sequence."""
        places = cache.capacity - int(cache.lengths.max()) - 1
        return min(places, self._config.lasting_positions - 1 - int(plan.positions.max()))

    def _short(self, plan: Plan, cache: KVCache) -> int:
        """Return after how many more tokens, after a planned one, the GPU takes longer for a step than the host."""
        config = self._config
        of_weights = 4 * config.hidden_size * (config.q_size + config.kv_size)
        of_a_token = 4 * plan.batch * config.kv_size
        return (SHORT_STEP - of_weights) // of_a_token - int(cache.lengths.max()) - 1

    def _launcher(self, one: Launch) -> Launcher:
        launcher = self._launchers.get(one)
        if launcher is None:
            launcher = self._launchers[one] = Launcher(one)
        return launcher

    def _maps(self, one: Launch, filled_in: np.ndarray) -> Any:
        """Return the tensor maps of a kernel's arrays, for one call, as a ctypes array of char."""
        if not one.boxes:
            return ctypes.create_string_buffer(0)
        call, config = {name: int(filled_in[name][0]) for name in MAPPED}, self._config
        rows, heads = call["batch"] * call["seq"], call["batch"] * config.num_key_value_heads
        v = ("v_cache", "capacity") if self._shape.dtype == "float16" else ("v", "scratch_capacity")
        # Address, columns, rows.
        qkv_proj = call["qkv_proj"], config.hidden_size, config.q_size + 2 * config.kv_size
        o_proj = call["o_proj"], config.q_size, config.hidden_size
        matrices = {
            "x": (call["x"], config.hidden_size, rows),
            "hidden": (call["hidden"], wgmma.hidden_columns(config, self._shape), rows),
            "hidden_parts": (call["hidden"], launch.HIDDEN_PARTS * config.hidden_size, rows),
            "qkv_proj": qkv_proj,
            "folded_proj": (call["folded_proj"], *qkv_proj[1:]),
            "tokens": (call["x"], config.hidden_size, rows),  # of decode: map_x puts another x there
            "qkv_rows": qkv_proj,
            "folded_rows": (call["folded_proj"], *qkv_proj[1:]),
            # Or, where there is none and nothing is copied, of something else.
            "k_proj": (call["k_proj"] or call["qkv_proj"], config.hidden_size // 2, config.kv_size),
            "q": (call["q"], config.q_size, self._shape.parts * rows),
            "k": (call["k"], config.head_dim, self._shape.parts * heads * call["scratch_capacity"]),
            "v": (call[v[0]], config.head_dim, heads * call[v[1]]),
            "attention": (call["attention"], config.q_size, rows),
            "o_proj": o_proj,
            "o_rows": o_proj,
        }
        maps = b"".join(
            tensor_map(*matrices[name], box_rows, by_quads=name.endswith("_proj"), once=name.endswith("_rows"))
            for name, box_rows in one.boxes
        )
        return ctypes.create_string_buffer(maps, len(maps))

    def _outgrown(self, plan: Plan) -> bool:
        """Whether dynamic RoPE has left the length whose angles the kernels have."""
        if self._config.rope.rope_type != "dynamic":
            return False
        return any(row[: n].max(initial=0) >= self._config.lasting_positions
                   for row, n in zip(plan.positions, plan.num_tokens, strict=True))  # fmt: skip

    def _plan_launches(self, plan: Plan, past_tiles: int, *, decode: bool) -> list[Launch]:
        config, shape, limits = self._config, self._shape, self._limits
        if decode:
            return wgmma.decode(config, shape, limits, plan.batch, plan.seq)
        return wgmma.prefill(config, shape, limits, plan.batch, plan.seq, past_tiles=past_tiles,
                             collect=plan.stages is not None)  # fmt: skip

    def _prepare(
        self, plan: Plan, cache: KVCache, launches: list[Launch], scratch: int, past_tiles: int, *, capturing: bool,
        decode: bool,
    ) -> tuple[Any, list[Any]]:  # fmt: skip
        """Fill in the call; return y and the arrays that must live until the kernels have been launched."""
        xp, config, shape = self.xp, self._config, self._shape
        batch, seq, parts = plan.batch, plan.seq, shape.parts
        x = _contiguous(xp, plan.x)
        residual = None if plan.residual is None else (x if plan.residual is plan.x else _contiguous(xp, plan.residual))
        y = plan.out if _writable_in_place(plan.out, residual) else xp.empty(plan.x.shape, plan.dtype)
        keep = [x, residual]

        def integers(values: np.ndarray) -> int:
            array = xp.asarray(np.ascontiguousarray(values, np.int32))
            keep.append(array)
            return int(array.data.ptr)

        workspace = workspace_of(self._device, xp.cuda.get_current_stream().ptr)
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        buffers: dict[str, tuple[tuple[int, ...], Any]] = {
            "rows": ((batch * seq, 2), np.int32),
            "attention": ((batch * seq, heads * dim), np.float16),
        }
        noted = any("x" in dict(one.boxes) for one in launches)
        if not noted:
            buffers["hidden"] = (batch * seq, launch.HIDDEN_PARTS, config.hidden_size), np.float16
        counts = [launch.ready_counters(batch * seq)]
        if decode:
            attend = next(one for one in launches if one.name == "attend_decode")
            part_words, head_counters = launch_decode.decode_parts(config, batch, seq, attend)
            few = [one for one in launches if one.name.endswith("_few")]
            buffers["qkv"] = (batch * seq, (heads + 2 * kv_heads) * dim), np.float32
            if few:
                buffers["partial"] = (max(launch.few_floats(one) for one in few),), np.float32
            runs, least = launch_decode.alike_runs(config, batch, seq, attend) if plan.unpadded else (0, 0)
            self._set(alike_runs=runs, alike_least=least)
            left = any(one.name == "decode_combine" for one in launches)
            if left:
                buffers["left_parts"] = (part_words, 4), np.uint32
            counts += [head_counters, *(launch.few_counters(one) for one in few)]
        else:
            buffers["q"] = (parts, batch * seq, heads, dim), np.float16
            buffers["k"] = (parts, batch, kv_heads, scratch, dim), np.float16
            if shape.dtype != "float16":
                buffers["v"] = (batch, kv_heads, scratch, dim), np.float16
        scratch_arrays = {name: workspace.take(name, size, dtype, capturing=capturing)
                          for name, (size, dtype) in buffers.items()}  # fmt: skip
        zeroed = {"counters": workspace.take("counters", (max(counts),), np.int32, capturing=capturing, zeroed=True)}
        if decode and left:
            scratch_arrays["parts"] = scratch_arrays.pop("left_parts")
            zeroed["runs"] = workspace.take("runs", (head_counters, 2), np.int32, capturing=capturing, zeroed=True)
        elif decode:
            zeroed["parts"] = workspace.take("parts", (part_words, 4), np.uint32, capturing=capturing, zeroed=True)
        self._set(notes=0)
        if noted:
            size = 1 + batch * seq, NOTE_WORDS
            zeroed["notes"] = workspace.take("notes", size, np.int32, capturing=capturing, zeroed=True)
        self._set(
            x=x.data.ptr, residual=0 if residual is None else residual.data.ptr, y=y.data.ptr,
            positions=0 if plan.counting_on else integers(plan.positions),
            num_tokens=0 if plan.unpadded else integers(plan.num_tokens),
            k_cache=cache.k_heads.data.ptr, v_cache=cache.v_heads.data.ptr, lengths=cache.device_lengths.data.ptr,
            cached_positions=cache.device_positions.data.ptr, fault=cache.device_fault.data.ptr,
            batch=batch, seq=seq, capacity=cache.capacity, scratch_capacity=scratch, past_tiles=past_tiles,
            heads_together=0 if decode else wgmma.heads_together(config, self._limits, batch, seq,
                                                                 past_tiles * launch.PAST_ROWS),
            **{name: array.data.ptr for name, array in (scratch_arrays | zeroed).items()},
        )  # fmt: skip
        if plan.stages is not None:
            self._collect(plan)
        return y, keep

    def _collect(self, plan: Plan) -> None:
        """Give the kernels zeroed arrays to collect stages in; padding rows stay zero."""
        config = self._config
        tokens = (plan.batch, plan.seq)
        q = (*tokens, config.num_attention_heads, config.head_dim)
        kv = (*tokens, config.num_key_value_heads, config.head_dim)
        hidden, rows = (*tokens, config.hidden_size), (plan.batch, config.num_attention_heads, plan.seq)
        shapes = dict(zip(PREFILL_STAGES, (hidden, q, kv, kv, q, kv, q, kv, rows, rows, q, hidden), strict=True))
        assert plan.stages is not None
        for name, size in shapes.items():
            plan.stages[name] = self.xp.zeros(size, np.float32)
            self._set(**{f"stage_{name}": plan.stages[name].data.ptr})


def _bucket(tokens: int) -> int:
    """Return the next power of two: scratch grows a few times, not with every chunk."""
    return 1 << max(6, (tokens - 1).bit_length())


def _contiguous(xp: Any, array: Any) -> Any:
    """Return an array in C order that starts at a multiple of 16 bytes: kernels read that much at a time."""
    array = xp.ascontiguousarray(array)
    return array if array.data.ptr % 16 == 0 else array.copy()


def _writable_in_place(out: Any, residual: Any) -> bool:
    """Whether kernels can write y to ``out`` itself: each element after that of the residual was read."""
    if out is None or not out.flags.c_contiguous or out.data.ptr % 16:
        return False
    if residual is None or residual.data.ptr == out.data.ptr:
        return True
    start, stop = residual.data.ptr, residual.data.ptr + residual.nbytes
    return bool(out.data.ptr + out.nbytes <= start or stop <= out.data.ptr)
