"""Launch arithmetic of decode: kernels for one new token a sequence, or a few.

Needs no GPU. Every formula here has its twin at the top of a file in ``kernels_cu``.
"""

from __future__ import annotations

import numpy as np

from . import launch
from .config import AttentionConfig
from .launch import Launch, Limits, Shape, macros_of, plain
from .rope import inverse_frequencies

DECODE_VECTORS = 8  # gemv.cuh: tokens that share one read of the weights
NORMALISED_ONCE = 4  # decode_project.cu: halves of more would leave attend_decode.cu no room beside them
GEMV_THREADS = 256
COMBINE_THREADS = 128  # decode_combine.cu
LEAST_LEFT = 9  # blocks of a head whose parts are left to it
# decode_project.cu, decode_output.cu: steps of W under way at once, by TILES.
PROJECT_STEPS, OUTPUT_STEPS = {2: 7, 3: 5, 4: 4, 5: 2}, {1: 8, 2: 8, 3: 4, 4: 4}
# gemv_lines.cuh: elements of a step, steps of a unit, what rows of a block are a multiple of, and how many at most.
LINE, LINE_UNITS, LINE_ROWS, MOST_LINES = 256, range(4, 17), 4, 64
GEMV_STATIC_SMEM = 33024  # decode_project.cu, decode_output.cu
MOST_ALIKE = 32  # attend_decode.cu: sequences that a warp compares at once
DECODE_TILE, DECODE_STAGES = 16, 2  # alike.cuh, decode_shared.cuh: keys of a warp's tile, tiles of its ring
MOST_SLOW = 1 / 64  # decode_scores.cuh: radians that pairs turn by whose keys are left as they are
DECODE_TOGETHER = 4  # shares.cuh: tiles that one rotation of more than 8 queries serves, at most
MOST_PIECES = 16  # shares.cuh
# Tokens of a call and of a sequence, and queries of a KV head and sequence, that decode kernels take, which share out
# keys among all multiprocessors but normalise them again for every 16 queries.
MAX_APPEND, SHORT_APPEND, SHORT_INVARIANT_APPEND, MAX_QUERIES = 64, 32, 16, 128


def _head_tiles(config: AttentionConfig, seq: int) -> int:
    """Tiles of 8 queries of S tokens a sequence that share one read of K and V."""
    return 1 if config.group * seq <= 8 else 2


def turn_stride(pairs: int) -> int:
    """Return what a row of ``turns`` for so many pairs of dims is long, in units of two (``decode_shared.cuh``)."""
    return pairs // 2 | 4


def turn_row(blocks: int) -> int:
    """Return what a row of ``half_turns`` for so many blocks is long, in units of 16 bytes (``decode_shared.cuh``)."""
    return -(-blocks // 2) * 4


def fast_blocks(config: AttentionConfig, keys: int) -> int:
    """Return how many blocks of eight pairs of dims have some that turn by more than ``MOST_SLOW`` over so many keys.

    One at least; blocks behind the last of them do not (``decode_scores.cuh``).
    """
    inv_freq, _ = inverse_frequencies(config, angles="float64")
    (fast,) = np.nonzero(inv_freq * (keys - 1) > MOST_SLOW)
    return int(fast.max(initial=0)) // 8 + 1


def leaves_parts(config: AttentionConfig, shape: Shape, limits: Limits, batch: int, seq: int) -> bool:
    """Return whether ``attend_decode.cu`` leaves it to ``decode_combine.cu`` to add up what its blocks found of a head.

    With more than 8 queries the last of a head's blocks would be long about it, where there are many of them.
    """
    tiles = _head_tiles(config, seq)
    heads = batch * config.num_key_value_heads * -(-config.group * seq // (8 * tiles))
    return limits.wgmma and tiles > 1 and not shape.batch_invariant and LEAST_LEFT * heads <= limits.num_sms


def decode_combine(config: AttentionConfig, shape: Shape, limits: Limits, seq: int) -> Launch:
    """Launch of ``decode_combine.cu``."""
    macros = macros_of(plain(shape), HEAD_TILES=_head_tiles(config, seq))
    return Launch("decode_combine", macros, limits.num_sms, COMBINE_THREADS, 0, overlaps=True)


def attend_decode(
    config: AttentionConfig, shape: Shape, limits: Limits, seq: int, *, alone: bool, leaves: bool = False
) -> Launch:
    """Launch of ``attend_decode.cu``: the grid is the GPU's, whatever the lengths.

    ``alone``: the kernel before leaves it no room to begin beside it, so it may have all of a multiprocessor.
    ``leaves``: the kernel behind it is ``decode_combine.cu``.
    """
    dim, head_tiles = config.head_dim, _head_tiles(config, seq)
    rows, blocks = 8 * head_tiles, dim // 16
    in_halves, in_floats = seq == 1 and config.group <= 4, shape.precise or shape.float32_angles
    joined = head_tiles == 2 and dim <= 128 and not (in_floats or shape.batch_invariant)
    keys = (DECODE_TOGETHER if joined else 1) * DECODE_TILE
    # On Hopper: 3 warps to a quarter of a multiprocessor do with the registers there are.
    most = alone and limits.wgmma and dim <= 128 and seq == 1 and head_tiles == 1 and not shape.batch_invariant
    many = (11, 10, 9) if most else ()

    def smem_of(warps: int, fast: int, half_turns: bool) -> int:
        second, q_rows = dim // 2 - (0 if half_turns else 8 * fast), 4 if in_halves else rows
        of_second = 2 * second + 8 if second else 0
        ring = warps * DECODE_STAGES * DECODE_TILE * (2 * (dim if dim % 64 == 0 else dim + 8) * 2 + 4)
        queries = warps * (q_rows * (shape.parts * (dim + 8) + of_second) * 2 + rows * 8) + rows * dim * 4
        turns = keys * 8 * fast
        if half_turns:
            turns = keys * turn_row(fast)
        elif joined:
            turns = (1 + keys) * turn_stride(8 * fast)
        return ring + queries + dim * 4 + (dim * 4 if shape.float32_angles else (turns + second) * 16)

    slow = fast_blocks(config, keys)
    ways = [(blocks, False)] if in_floats else [(slow, True)] * shape.half_turns + [(slow, False), (blocks, False)]
    # Fewer warps would cost more than other ways do.
    sizes = [(warps, *way, smem_of(warps, *way)) for warps in (*many, 8, 4, 2, 1) for way in ways]
    warps, fast, half_turns, smem = next((size for size in sizes if limits.blocks_a_sm(size[-1], 1)), sizes[-1])
    macros = macros_of(shape, HEAD_TILES=head_tiles, WARPS=warps, WINDOW=shape.windowed and 1,
                       FLOAT32_ANGLES=shape.float32_angles and 1, SEVERAL=seq > 1 and 1,
                       BATCH_INVARIANT=shape.batch_invariant and 1, HALVES=in_halves and 1,
                       SLOW_FROM=fast < blocks and fast, HALF_TURNS=half_turns and 1,
                       TOGETHER=joined and DECODE_TOGETHER, LEAVES_PARTS=leaves and 1)  # fmt: skip
    return Launch("attend_decode", macros, limits.num_sms, 32 * warps, smem, overlaps=True)


def decode_parts(config: AttentionConfig, batch: int, seq: int, one: Launch) -> tuple[int, int]:
    """Return the words of 128 bits of all parts that ``attend_decode.cu`` writes at most, and the counters it needs."""
    rows = 8 * _head_tiles(config, seq)
    heads = batch * config.num_key_value_heads * -(-config.group * seq // rows)
    runs = heads * MOST_PIECES if "BATCH_INVARIANT" in dict(one.macros) else one.grid
    return (runs + heads) * min(rows, config.group * seq) * (config.head_dim // 2), heads


def alike_runs(config: AttentionConfig, batch: int, seq: int, one: Launch) -> tuple[int, int]:
    """Return a call's ``alike_runs`` and ``alike_least`` (``alike.cuh``), for sequences alike in length.

    The first is how many blocks of ``attend_decode.cu`` a head has at most for one token of its sequence, 0 for other
    calls; the second how many tiles each of them has at least, if there are several.
    """
    macros, runs = dict(one.macros), one.grid // (batch * config.num_key_value_heads)
    is_split = config.group > 8 * _head_tiles(config, seq)
    if seq > 1 or batch > MOST_ALIKE or "BATCH_INVARIANT" in macros or is_split or runs < 1:
        return 0, 0
    return runs, int(macros["WARPS"])


def _gemv_tiles(sizes: tuple[int, ...], rows: int, limits: Limits) -> int:
    """Return how many tiles of 8 rows of W a block of ``decode_*.cu`` takes, the first of the best of ``sizes``.

    At most two blocks a multiprocessor, since no more begin ahead of time; and as few rows as can be on the one that
    has most.
    """
    blocks = {size: -(-rows // (8 * size)) for size in sizes}
    sizes = tuple(size for size in sizes if blocks[size] <= 2 * limits.num_sms) or (max(sizes),)
    return min(sizes, key=lambda size: -(-blocks[size] // limits.num_sms) * size)


def _gemv_steps(under_way: dict[int, int], tiles: int, k_size: int) -> int:
    """Return how many steps of W a warp of ``decode_*.cu`` takes, if all are under way at once; otherwise 0."""
    steps = -(-k_size // GEMV_THREADS)
    return steps if steps <= under_way[tiles] else 0


def _lines(rows: int, k_size: int, limits: Limits) -> tuple[int, int] | None:
    """Return how many blocks share rows of W out as ``gemv_lines.cuh`` reads them, and its UNIT; None if it does not.

    At most two blocks a multiprocessor, and as few rows as can be on the one that has most.
    """
    unit, rest = divmod(k_size, 2 * LINE)
    blocks = {n: -(-rows // n) for n in range(LINE_ROWS, MOST_LINES + 1, LINE_ROWS)}
    sizes = [n for n in blocks if blocks[n] <= 2 * limits.num_sms]
    if rest or unit not in LINE_UNITS or not sizes:
        return None
    return blocks[min(sizes, key=lambda n: -(-blocks[n] // limits.num_sms) * n)], unit


def reads_lines(config: AttentionConfig, limits: Limits) -> bool:
    """Return whether rows of both projections' weights can be read as lines, for one token."""
    rows = config.q_size + 2 * config.kv_size
    return all(_lines(*size, limits) for size in ((rows, config.hidden_size), (config.hidden_size, config.q_size)))


def _gemv(
    rows: int, k_size: int, limits: Limits, sizes: tuple[int, ...], under_way: dict[int, int], *, is_one: bool
) -> tuple[int, dict[str, int]]:
    """Return the grid of ``decode_*.cu`` and the macros that say how it reads W, for one token or more.

    A block to each piece of W, one more, and no fewer than multiprocessors: with one less a layer takes longer, since
    ``attend_decode.cu`` has room beside one block only.
    """
    tiles = _gemv_tiles(sizes, rows, limits)
    blocks, macros = -(-rows // (8 * tiles)), {"TILES": tiles, "STEPS": _gemv_steps(under_way, tiles, k_size)}
    lines = _lines(rows, k_size, limits)
    if is_one and lines and not macros["STEPS"]:
        blocks, macros = lines[0], {"UNIT": lines[1]}
    return max(blocks + 1, limits.num_sms), macros


def decode_project(config: AttentionConfig, shape: Shape, limits: Limits, batch: int) -> Launch | None:
    """Launch of ``decode_project.cu``, or of the one for folded weights; None for more tokens than they take."""
    size, rows = config.hidden_size, config.q_size + 2 * config.kv_size
    norm, rows_of_x = -(-size // 32) * 32 * 4, batch * (-(-size // 64) * 64 + 32) * 2
    if batch > DECODE_VECTORS or norm + rows_of_x + GEMV_STATIC_SMEM > limits.block_smem:
        return None
    halves = batch * (-(-size // 32) * 8 + 1) * 16
    once = batch <= NORMALISED_ONCE and norm + halves + GEMV_STATIC_SMEM <= limits.block_smem
    is_one = batch == 1 and (once or shape.folded)
    grid, how = _gemv(rows, size, limits, (4, 3, 2, 5), PROJECT_STEPS, is_one=is_one)
    if shape.folded:
        macros = macros_of(plain(shape), MANY=batch > NORMALISED_ONCE and 1, **how)
        smem = size * 2 if "UNIT" in how else 0 if how["STEPS"] else rows_of_x
        return Launch("decode_project_folded", macros, grid, GEMV_THREADS, smem, overlaps=True)
    warps = GEMV_THREADS // 32 >> (batch - 1).bit_length()  # to a token
    held = min(-(-size // (warps * 32 * 8)), 2) if once else 0
    macros = macros_of(plain(shape), HELD=held, **how)
    smem = norm + (halves if once else rows_of_x)
    return Launch("decode_project", macros, grid, GEMV_THREADS, smem, overlaps=True)


def decode_output(config: AttentionConfig, shape: Shape, limits: Limits, batch: int) -> Launch | None:
    """Launch of ``decode_output.cu``, or None for more tokens than it takes."""
    if batch > DECODE_VECTORS:
        return None
    sizes = (1, 2, 3, 4)
    grid, how = _gemv(config.hidden_size, config.q_size, limits, sizes, OUTPUT_STEPS, is_one=batch == 1)
    return Launch("decode_output", macros_of(plain(shape), **how), grid, GEMV_THREADS, 0, overlaps=True)


def decodes(config: AttentionConfig, shape: Shape, batch: int, seq: int) -> bool:
    """Return whether a call of S tokens a sequence takes the launches of :func:`decode`, and not those of prefill."""
    fits = seq <= SHORT_INVARIANT_APPEND if shape.batch_invariant else seq <= SHORT_APPEND and batch * seq <= MAX_APPEND
    return seq == 1 or (fits and config.group * seq <= MAX_QUERIES)


def decode(config: AttentionConfig, shape: Shape, limits: Limits, batch: int, seq: int) -> list[Launch]:
    """Return the launches of a call of one token a sequence, or a few."""
    tokens = batch * seq
    # Whatever the batch, the same kernels must multiply.
    first = None if shape.batch_invariant else decode_project(config, shape, limits, tokens)
    last = None if shape.batch_invariant else decode_output(config, shape, limits, tokens)
    few = launch.holds_a_row(config, limits) and (tokens <= launch.MAX_FEW or shape.batch_invariant)
    alone = first is None
    if first is None and few:
        first = launch.project_qkv_few(config, shape, limits, tokens)
    if last is None and few:
        last = launch.project_output_few(config, shape, limits, tokens)
    if first is None:
        first = launch.project_qkv(config, shape, limits, tokens, past_tiles=0, batch=batch, raw=True, collect=False)
    if last is None:
        last = launch.project_output(config, shape, limits, tokens, collect=False)
    leaves = leaves_parts(config, shape, limits, batch, seq)
    middle = [attend_decode(config, shape, limits, seq, alone=alone, leaves=leaves)]
    if leaves:
        middle.append(decode_combine(config, shape, limits, seq))
    return [first, *middle, last]
