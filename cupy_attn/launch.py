"""Launch arithmetic of the CUDA kernels: tile sizes, grids, shared memory; and what a call consists of.

Needs no GPU. Every formula here has its twin at the top of a file in ``kernels_cu``.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from .config import AttentionConfig
from .kernels import CUDA_NAMES, Macros

MAX_HEAD_DIM = 256
FEW_ROWS, FEW_THREADS, FEW_CHUNK, FEW_STAGES, MAX_SPLITS = 64, 128, 64, 4, 8  # gemm_few.cuh
MOST_ROW_THREADS = 992  # normalise_rows.cu: that share a row
MAX_FEW = 256  # tokens: for more than that, tiles of a matrix product read the weights less often
GEMM_WARPS, GEMM_BLOCK_K = 4, 64
NORM_ROWS = 4  # project_qkv.cu: rows of one piece of work
PAST_ROWS = 64  # prepare_past.cuh: cached keys, in what a call says of them
HIDDEN_PARTS = 2  # project.cuh: float16 numbers that hold one normalised hidden state

_POINTERS = (
    "x", "residual", "y", "positions", "num_tokens", "qkv_proj", "folded_proj", "o_proj", "k_proj", "input_norm",
    "q_norm", "k_norm", "qkv_bias", "o_bias", "frequency", "k_turns", "turns", "half_turns", "second_turns",
    "k_cache", "v_cache", "lengths", "cached_positions", "fault", "rows", "notes", "hidden", "q", "k", "v", "attention",
    "qkv", "partial", "parts", "runs", "counters",
    "stage_input_norm", "stage_q", "stage_k", "stage_v", "stage_q_norm", "stage_k_norm", "stage_q_rope", "stage_k_rope",
    "stage_row_max", "stage_lse", "stage_attention", "stage_output",
)  # fmt: skip
_INTEGERS = (
    "batch", "seq", "hidden_size", "num_q_heads", "num_kv_heads", "capacity", "scratch_capacity", "past_tiles",
    "heads_together", "group", "alike_runs", "alike_least", "max_position", "window",
)  # fmt: skip
_FLOATS = (
    "eps", "qkv_scale", "qkv_unscale", "folded_rescale", "o_unscale", "rest_unscale", "score_scale", "v_scale",
    "hidden_unscale", "q_norm_unscale", "q_rope_unscale", "k_norm_unscale", "k_rope_unscale",
)  # fmt: skip
CALL = np.dtype(
    [(name, np.uint64) for name in _POINTERS]
    + [(name, np.int32) for name in _INTEGERS]
    + [(name, np.float32) for name in _FLOATS],
    align=True,
)
"""``struct Call`` of call.cuh."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a GPU offers: multiprocessors, shared memory in bytes for one block and for one multiprocessor, wgmma."""

    num_sms: int
    block_smem: int
    sm_smem: int
    wgmma: bool = False

    def blocks_a_sm(self, smem_bytes: int, at_most: int) -> int:
        """Return how many blocks with this much dynamic shared memory a multiprocessor holds, 0 if none."""
        if smem_bytes + STATIC_SMEM > self.block_smem:
            return 0
        return min(at_most, self.sm_smem // (smem_bytes + STATIC_SMEM + RESERVED_SMEM))


STATIC_SMEM = 512  # at most, of all kernels but decode's gemv ones, rounded up to how their dynamic memory is aligned
RESERVED_SMEM = 1024  # of every block, by the driver (CUDA C++ Programming Guide, compute capabilities)


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the kernels are specialised for: storage dtype, head_dim, precise scores, window, angles; whether the bits
    of a sequence may depend on the others of the batch; whether there is a Wqkv with the input norm's weight in it;
    whether norm weights keep scores so close that no weight of a softmax is infinite, whichever it is relative to;
    whether they are so small that decode may round cached keys once more.
    """

    dtype: str
    head_dim: int
    precise: bool
    windowed: bool
    float32_angles: bool
    batch_invariant: bool = False
    folded: bool = False
    close_scores: bool = False
    half_turns: bool = False

    @property
    def parts(self) -> int:
        """Float16 numbers that hold one operand of a score."""
        return 2 if self.precise else 1


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel of a call.

    ``overlaps``: it may begin before the one ahead of it has ended (launcher.py). ``cluster``: of how many blocks those
    clusters are that go on until all work is done; the grid is then cut to what the GPU holds at a time. ``splits``: of
    how many those are whose size the source leaves to the launch. ``boxes``: the arrays that it copies through tensor
    maps, in the order of its ``struct Maps``, and the rows of one copy.
    """

    name: str
    macros: Macros
    grid: int
    threads: int
    smem_bytes: int
    overlaps: bool = False
    cluster: int = 1
    splits: int = 1
    boxes: tuple[tuple[str, int], ...] = ()


def supported(config: AttentionConfig, dtype: str) -> str | None:
    """Return why there is no kernel for a config and storage dtype, or None."""
    if dtype == "float32":
        return "the storage dtype is float32"
    if config.head_dim % 16 or config.head_dim > MAX_HEAD_DIM:
        return f"head_dim is {config.head_dim}, not a multiple of 16 up to {MAX_HEAD_DIM}"
    if config.hidden_size % 8:
        return f"hidden_size is {config.hidden_size}, not a multiple of 8"
    return None


def macros_of(shape: Shape, **values: object) -> Macros:
    """Return the ``-D`` macros of a shape, and others that are not False."""
    named = {"STORAGE": CUDA_NAMES[shape.dtype], "HEAD_DIM": shape.head_dim, "PARTS": shape.parts} | values
    return tuple(sorted((key, str(value)) for key, value in named.items() if value is not False))


def plain(shape: Shape) -> Shape:
    """Return what a kernel that computes no scores is specialised for."""
    return dataclasses.replace(shape, precise=False)


def _rows_a_warp(head_dim: int) -> int:
    """Rows whose sums, times head_dim columns, fit a warp's registers."""
    return 32 if head_dim <= 128 else 16


def _gemm_stages(block_m: int, block_n: int, limits: Limits) -> tuple[int, int]:
    """Return how many buffers a tile's copies go through, and their bytes: two blocks a multiprocessor, if possible."""
    stage = (block_m + block_n) * GEMM_BLOCK_K * 2
    stages = max(range(2, 7), key=lambda n: (limits.blocks_a_sm(n * stage, 2), n))
    return stages, stages * stage


def project_qkv(
    config: AttentionConfig, shape: Shape, limits: Limits, rows: int, *, past_tiles: int, batch: int, raw: bool,
    collect: bool,
) -> Launch:  # fmt: skip
    """Launch of ``project_qkv.cu`` for ``rows`` rows of x."""
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    block_n = config.head_dim * max(1, 128 // config.head_dim)
    n_tiles = -(-heads * config.head_dim // block_n)
    warp_m = _rows_a_warp(config.head_dim)
    # The exact sums of the precise path take the registers of the other 16 rows.
    if shape.precise or -(-rows // (GEMM_WARPS * warp_m)) * n_tiles < limits.num_sms:
        warp_m = 16
    block_m = GEMM_WARPS * warp_m
    stages, smem = _gemm_stages(block_m, block_n, limits)
    items = -(-rows // NORM_ROWS) + past_tiles * batch * config.num_key_value_heads + -(-rows // block_m) * n_tiles
    macros = macros_of(shape, WARP_M=warp_m, BLOCK_N=block_n, GEMM_STAGES=stages, RAW=raw and 1, COLLECT=collect and 1,
                       FLOAT32_ANGLES=shape.float32_angles and 1)  # fmt: skip
    grid = min(items, limits.num_sms * limits.blocks_a_sm(smem, 2))
    return Launch("project_qkv", macros, grid, 32 * GEMM_WARPS, smem)


def ready_counters(rows: int) -> int:
    """Return how many counters ``project_qkv.cu`` needs: two, and one for each tile of 64 of the ``rows`` rows of x."""
    return 2 + -(-rows // (GEMM_WARPS * 16))


def project_output(config: AttentionConfig, shape: Shape, limits: Limits, rows: int, *, collect: bool) -> Launch:
    """Launch of ``project_output.cu``."""
    # Tiles as large as leave every multiprocessor more than one: on an H200, 2,048 tokens of the 0.6B shape took 41, 32
    # and 35 us with 64 x 64, 128 x 64 and 128 x 128, 1,024 tokens 21, 21 and 33.
    for warp_m, block_n in ((32, 128), (32, 64), (16, 64)):
        block_m = GEMM_WARPS * warp_m
        grid = -(-rows // block_m) * -(-config.hidden_size // block_n)
        if 2 * grid >= 3 * limits.num_sms:
            break
    stages, smem = _gemm_stages(block_m, block_n, limits)
    macros = macros_of(plain(shape), WARP_M=warp_m, BLOCK_N=block_n, GEMM_STAGES=stages, COLLECT=collect and 1)
    return Launch("project_output", macros, grid, 32 * GEMM_WARPS, smem)


def attend_prefill(
    config: AttentionConfig, shape: Shape, limits: Limits, batch: int, seq: int, *, collect: bool
) -> Launch:
    """Launch of ``attend_prefill.cu``: of the tiles that fit, those that keep most warps on a multiprocessor."""
    warp_m = _rows_a_warp(config.head_dim)
    heads = (1 if shape.batch_invariant else batch) * config.num_attention_heads
    if warp_m == 32 and -(-seq // 128) * heads < 2 * limits.num_sms:  # too few blocks: halve them
        warp_m = 16
    best: tuple[int, ...] = (0,)
    for warps in (4, 2, 1):
        for block_n in (64, 32, 16):
            rows = shape.parts * warps * warp_m + 2 * (shape.parts + 1) * block_n
            smem = rows * (config.head_dim + 8) * 2
            busy = warps * limits.blocks_a_sm(smem, 2)
            if shape.parts == 2 and block_n == 64:  # more sums than registers
                continue
            best = max(best, (busy, warps, block_n, smem))
    _, warps, block_n, smem = best
    macros = macros_of(shape, WARPS=warps, WARP_M=warp_m, BLOCK_N=block_n, WINDOW=shape.windowed and 1,
                       COLLECT=collect and 1)  # fmt: skip
    grid = -(-seq // (warps * warp_m)) * config.num_attention_heads * batch
    return Launch("attend_prefill", macros, grid, 32 * warps, smem)


def _few(name: str, shape: Shape, limits: Limits, tokens: int, rows: int, k_size: int, parts: int) -> Launch:
    """Return the launch of a product of W [rows, k_size] with a few tokens."""
    groups = next(n for n in (2, 4, 8) if 8 * n >= tokens or n == 8)
    tiles, chunks = -(-rows // FEW_ROWS), -(-k_size // FEW_CHUNK)
    # What keeps multiprocessors equally busy, whatever the tokens: how k is split decides the order of sums.
    splits = min(
        (n for n in range(1, MAX_SPLITS + 1) if n == 1 or (n <= chunks and tiles * n <= 3 * limits.num_sms)),
        key=lambda n: (-(-tiles * n // limits.num_sms) / n, abs(tiles * n - 2 * limits.num_sms)),
    )
    # Where a second block fits on each multiprocessor, two with half of the tokens are sooner done than one with all.
    while groups > 2 and 2 * tiles * splits * -(-tokens // (8 * groups)) <= 2 * limits.num_sms:
        groups //= 2
    macros = macros_of(shape, GROUPS=groups)
    smem = FEW_STAGES * parts * 8 * groups * FEW_CHUNK * 2
    return Launch(name, macros, tiles * splits * -(-tokens // (8 * groups)), FEW_THREADS, smem, overlaps=True)


def _row_bytes(config: AttentionConfig) -> int:
    """Return the shared memory for a row of x and the norm's weight."""
    return config.hidden_size * (4 + 2)


def holds_a_row(config: AttentionConfig, limits: Limits) -> bool:
    """Return whether a row of x fits shared memory, which who normalises one by a block wants."""
    return _row_bytes(config) + STATIC_SMEM <= limits.block_smem


def project_qkv_few(config: AttentionConfig, shape: Shape, limits: Limits, tokens: int) -> Launch:
    """Launch of ``project_qkv_few.cu``."""
    rows = config.q_size + 2 * config.kv_size
    one = _few("project_qkv_few", shape, limits, tokens, rows, config.hidden_size, HIDDEN_PARTS)
    smem = max(one.smem_bytes, _row_bytes(config))
    return dataclasses.replace(one, grid=tokens + one.grid, smem_bytes=smem)  # a block to normalise each token


def normalise_rows(config: AttentionConfig, shape: Shape, tokens: int, *, rest: str = "__half") -> Launch:
    """Launch of ``normalise_rows.cu``, which is for Hopper. ``rest``: the type of what rounding left over."""
    vectors = -(-config.hidden_size // 8)
    each = -(-vectors // MOST_ROW_THREADS)
    threads = -(-vectors // (32 * each)) * 32
    macros = macros_of(plain(shape), REST=rest, VECTORS=each)
    return Launch("normalise_rows", macros, tokens, threads + 32, 0, overlaps=True)


def project_output_few(config: AttentionConfig, shape: Shape, limits: Limits, tokens: int) -> Launch:
    """Launch of ``project_output_few.cu``."""
    return _few("project_output_few", plain(shape), limits, tokens, config.hidden_size, config.q_size, 1)


def few_floats(one: Launch) -> int:
    """Return the floats that blocks of ``project_*_few.cu`` leave for each other in memory."""
    return one.grid * FEW_ROWS * 8 * int(dict(one.macros)["GROUPS"])


def few_counters(one: Launch) -> int:
    """Return the counters that ``project_*_few.cu`` need: two, and one for each tile; blocks are no fewer."""
    return 2 + one.grid


def prefill(
    config: AttentionConfig, shape: Shape, limits: Limits, batch: int, seq: int, *, past_tiles: int, collect: bool
) -> list[Launch]:
    """Return the launches of a call of S tokens a sequence."""
    rows = batch * seq
    return [
        project_qkv(config, shape, limits, rows, past_tiles=past_tiles, batch=batch, raw=False, collect=collect),
        attend_prefill(config, shape, limits, batch, seq, collect=collect),
        project_output(config, shape, limits, rows, collect=collect),
    ]
