"""Launch arithmetic of what runs on Hopper's own units: what ``*_wgmma.cu`` take, and with which tiles.

Needs no GPU. Every formula here has its twin at the top of a file in ``kernels_cu``.
"""

from __future__ import annotations

import os

from . import launch, launch_decode
from .config import AttentionConfig
from .launch import GEMM_BLOCK_K, Launch, Limits, Shape, macros_of

PORTABLE_VARIABLE = "CUPY_ATTN_PORTABLE"
"""Set to anything but 0 or nothing: take the kernels that run on every GPU, on Hopper too."""

HEAD_DIM = 128
BLOCK_M = 128  # rows of x, or queries, of a block
WARPGROUP, THREADS = 128, 384
BOX_ROWS = 128  # of W, in one copy, at most
CLUSTER = 2  # blocks that share what they copy of W
SPLITS, SPLIT_COLUMNS = 2, 64  # blocks that share a tile, each with a part of k; columns of the tile
LEAST_ROWS, LEAST_QUERIES = 64, 128  # of a call, of a sequence: fewer leave most of a tile empty
STAGES = 2  # attend_wgmma.cu
# There: bytes of keys and values, or up to twice as many, that stay in L2 while many tiles read them, of an H200's
# 50 MB; and tiles of those heads for every multiprocessor, at least, as in the end all wait for the longest.
L2_SHARE, LEAST_TILES = 16 << 20, 3
SENT = 2 * (32 // 4 + 1) * WARPGROUP * 16  # there: what two warpgroups send each other, in bytes
TABLES = 2 * HEAD_DIM * 4 + HEAD_DIM // 2 * 16  # finish_heads.cuh: norms' weights, frequencies and steps, in bytes
NOTES = 2 * 8 * 4 * 32 * 8 * 2  # row_notes.cuh: rows of two warps, in bytes
PAST_ROWS_A_WARP = 8
ALIGNMENT = 1024  # of dynamic shared memory; what is static takes no more than that
# gemm_few_wgmma.cuh: tokens of a warpgroup, and how many warpgroups share W; rows of W of a cluster, at most as many as
# fit registers three times on the precise path, for one warpgroup and for two; blocks of a cluster; buffers.
FEW_TOKENS, MOST_TOKEN_TILES, FEW_SPLITS = 64, 2, (1, 2, 4)
FEW_COLUMNS, MOST_EXACT_COLUMNS = (48, 64, 96, 128, 144, 160, 192, 224, 256), (144, 96)
X_BYTES, MOST_X_STAGES, MOST_W_STAGES = 48 << 10, 16, 20
ROUND = 4096  # what it costs that clusters begin when others end, in rows of 64 columns
# The fewest tokens of a decode call that those kernels are taken for, unless q, k and v have so many weights and it is
# not one for which they are read as lines; the most rows of a prefill whose output they project.
LEAST_FEW, MANY_WEIGHTS, MOST_FEW_ROWS = launch_decode.DECODE_VECTORS + 1, 20 << 20, 256


def is_wanted() -> bool:
    """Return whether the environment leaves these kernels in use."""
    return os.environ.get(PORTABLE_VARIABLE, "0") in ("", "0")


def projects(config: AttentionConfig, shape: Shape, limits: Limits, rows: int, *, collect: bool) -> bool:
    """Return whether both projections of ``rows`` rows of x run on these kernels."""
    return _can_project(config, shape, limits) and rows >= LEAST_ROWS and not collect


def _can_project(config: AttentionConfig, shape: Shape, limits: Limits) -> bool:
    """Return whether both projections of enough rows run on these kernels."""
    fits = shape.head_dim == HEAD_DIM and config.hidden_size % GEMM_BLOCK_K == 0 and launch.holds_a_row(config, limits)
    return limits.wgmma and limits.num_sms >= CLUSTER and fits


def attends(shape: Shape, limits: Limits, seq: int, *, collect: bool) -> bool:
    """Return whether attention of S queries a sequence runs on these kernels."""
    return limits.wgmma and shape.head_dim == HEAD_DIM and not collect and seq >= LEAST_QUERIES


def can_multiply_rest(shape: Shape, limits: Limits) -> bool:
    """Return whether prefill can have 8-bit products of K's weights and what rounding of hidden states leaves over."""
    return limits.wgmma and shape.head_dim == HEAD_DIM and not shape.precise


def can_fold(config: AttentionConfig, shape: Shape, limits: Limits) -> bool:
    """Return whether x can be multiplied as it is, by a Wqkv that has the input norm's weight in it."""
    return _can_project(config, shape, limits) and not shape.precise and shape.dtype == "float16"


def hidden_columns(config: AttentionConfig, shape: Shape) -> int:
    """Return what a row of ``hidden`` is long, in float16: H numbers, and what rounding left over, of 8 bits or 16."""
    return config.hidden_size * (4 if shape.precise else 3) // 2


def _project(
    name: str, shape: Shape, limits: Limits, rows: int, columns: int, sizes: tuple[int, ...],
    boxes: tuple[str, ...], *, least: int = 0, tables: int = 0, **macros: object,
) -> Launch:  # fmt: skip
    """Return the launch of a product of ``rows`` rows.

    ``columns``: of the result. ``sizes``: how many a tile may have. ``boxes``: the arrays that are copied, x and those
    of weights. ``least``: blocks that there is other work for. ``tables``: bytes of shared memory behind the buffers.
    """
    tiles = {size: -(-rows // (BLOCK_M * CLUSTER)) * -(-columns // size) for size in sizes}
    clusters = limits.num_sms // CLUSTER
    # Rounds of all clusters, times what a tile takes: narrow ones read more of x and W for every product.
    block_n = min(sizes, key=lambda size: -(-tiles[size] // clusters) * {256: 256, 128: 144, 64: 92}[size])
    stage = (BLOCK_M + block_n) * GEMM_BLOCK_K * 2
    stages = min(6, (limits.block_smem - ALIGNMENT - tables) // stage)
    settings = macros_of(shape, BLOCK_N=block_n, GEMM_STAGES=stages, CLUSTER=CLUSTER, **macros)
    grid = min(clusters, max(tiles[block_n], -(-least // CLUSTER))) * CLUSTER
    copied = ((boxes[0], BLOCK_M), *((name, min(block_n // CLUSTER, BOX_ROWS)) for name in boxes[1:]))
    return Launch(name, settings, grid, THREADS, stages * stage + tables, overlaps=True, cluster=CLUSTER, boxes=copied)


def project_qkv(config: AttentionConfig, shape: Shape, limits: Limits, rows: int, past: int) -> Launch:
    """Launch of ``project_qkv_wgmma.cu`` for ``rows`` rows of x and ``past`` cached keys of all heads."""
    warps = -(-past // PAST_ROWS_A_WARP)
    boxes = ("x", "folded_proj") if shape.folded else ("hidden", "qkv_proj", *(() if shape.precise else ("k_proj",)))
    return _project("project_qkv_wgmma", shape, limits, rows, config.q_size + 2 * config.kv_size,
                    (128,) if shape.precise else (256, 128), boxes, least=-(-warps // (THREADS // 32)),
                    tables=TABLES + (NOTES if shape.folded else 0), FLOAT32_ANGLES=shape.float32_angles and 1,
                    FOLDED=shape.folded and 1)  # fmt: skip


def attend(config: AttentionConfig, shape: Shape, limits: Limits, batch: int, seq: int) -> Launch:
    """Launch of ``attend_wgmma.cu``."""
    # Where every tile has a multiprocessor, all wait for those with most keys. With half as many queries a tile, and
    # keys shared by a block's warpgroups, they are done sooner. Not where bits may not depend on the batch.
    heads = config.num_attention_heads * batch
    splits = not (shape.precise or shape.batch_invariant) and -(-seq // BLOCK_M) * heads <= limits.num_sms
    block_m, block_n, stages = (64, 64, 2 * STAGES) if splits else (BLOCK_M, 64 if shape.precise else 128, STAGES)
    smem = (2 * shape.parts * block_m + stages * (shape.parts + 1) * block_n) * HEAD_DIM * 2 + (SENT if splits else 0)
    cluster = 1 if splits or config.group % CLUSTER or limits.num_sms < CLUSTER else CLUSTER  # heads of one KV head
    grid = min(limits.num_sms // cluster, -(-seq // block_m) * heads // cluster) * cluster
    boxes = (("q", block_m), ("k", block_n // cluster), ("v", block_n // cluster))
    macros = macros_of(shape, CLUSTER=cluster, WINDOW=shape.windowed and 1, SPLIT_KEYS=splits and 1,
                       OPTIMISTIC=shape.close_scores and not (splits or shape.precise) and 1)  # fmt: skip
    return Launch("attend_wgmma", macros, grid, THREADS, smem, overlaps=True, cluster=cluster, boxes=boxes)


def heads_together(config: AttentionConfig, limits: Limits, batch: int, seq: int, past: int) -> int:
    """Return how many KV heads ``attend_wgmma.cu`` goes through together: S queries a sequence after ``past`` keys."""
    heads, m_tiles = batch * config.num_key_value_heads, -(-seq // BLOCK_M)
    fit = L2_SHARE // ((past + seq) * 2 * config.head_dim * 2)
    least = -(-LEAST_TILES * limits.num_sms // (m_tiles * config.group))
    return -(-heads // max(heads // max(fit, least, 1), 1))


def project_output(config: AttentionConfig, shape: Shape, limits: Limits, rows: int) -> Launch:
    """Launch of ``project_output_wgmma.cu``, or where that would leave half of the GPU idle with k split."""
    plain = launch.plain(shape)
    one = _project("project_output_wgmma", plain, limits, rows, config.hidden_size, (256, 128, 64),
                   ("attention", "o_proj"))  # fmt: skip
    # Whatever the batch, k must be cut the same way if bits may not depend on it.
    if 2 * one.grid > limits.num_sms or shape.batch_invariant:
        return one
    if rows <= MOST_FEW_ROWS:
        return _project_output_few(config, plain, limits, rows, room=0)
    return _project_output_split(config, plain, limits, rows)


def _project_output_split(config: AttentionConfig, plain: Shape, limits: Limits, rows: int) -> Launch:
    """Launch of ``project_output_wgmma.cu`` with two blocks to a tile."""
    tiles = -(-rows // BLOCK_M) * -(-config.hidden_size // SPLIT_COLUMNS)
    stage, received = (BLOCK_M + SPLIT_COLUMNS) * GEMM_BLOCK_K * 2, SPLIT_COLUMNS // 4 << 10
    stages = (limits.block_smem - ALIGNMENT - received) // stage
    settings = macros_of(plain, BLOCK_N=SPLIT_COLUMNS, GEMM_STAGES=stages, CLUSTER=1, SPLITS=SPLITS)
    grid = min(limits.num_sms // SPLITS, tiles) * SPLITS
    boxes = (("attention", BLOCK_M), ("o_proj", SPLIT_COLUMNS))
    smem = stages * stage + received
    return Launch("project_output_wgmma", settings, grid, THREADS, smem, overlaps=True, cluster=SPLITS, boxes=boxes)


def prefill(
    config: AttentionConfig, shape: Shape, limits: Limits, batch: int, seq: int, *, past_tiles: int, collect: bool
) -> list[Launch]:
    """Return the launches of a call of S tokens a sequence, those of ``launch.prefill`` where these do not fit."""
    first, middle, last = launch.prefill(config, shape, limits, batch, seq, past_tiles=past_tiles, collect=collect)
    rows = batch * seq
    ahead = []
    if projects(config, shape, limits, seq if shape.batch_invariant else rows, collect=collect):
        past = past_tiles * launch.PAST_ROWS * batch * config.num_key_value_heads
        if not shape.folded:
            ahead = [launch.normalise_rows(config, shape, rows, rest="__half" if shape.precise else "E4M3")]
        first, last = project_qkv(config, shape, limits, rows, past), project_output(config, shape, limits, rows)
    if attends(shape, limits, seq, collect=collect):
        middle = attend(config, shape, limits, batch, seq)
    return [*ahead, first, middle, last]


def _clusters(limits: Limits, blocks: int) -> int:
    """Return how many clusters run at a time, a block to a multiprocessor: of 4, the 132 of an H200 hold 30."""
    # They come in groups, of which one that is no multiple of a cluster leaves some over.
    return max((limits.num_sms if blocks <= 2 else limits.num_sms * 9 // 10) // blocks, 1)


def _few(
    name: str, shape: Shape, limits: Limits, tokens: int, rows: int, k_size: int, boxes: tuple[str, str], room: int,
    *, folded: bool = False,
) -> Launch:  # fmt: skip
    """Return the launch of a product of W [rows, k_size] with some tokens.

    ``boxes``: the arrays that are copied, of tokens and of W. ``room``: bytes of shared memory left to other kernels.
    ``folded``: tokens are rows of x as they are.
    """
    token_tiles, chunks = min(-(-tokens // FEW_TOKENS), MOST_TOKEN_TILES), -(-k_size // GEMM_BLOCK_K)
    of_cluster, groups = min(tokens, token_tiles * FEW_TOKENS), -(-tokens // (token_tiles * FEW_TOKENS))
    # Whatever the batch, k must be cut the same way if bits may not depend on it.
    seen_tiles, seen_groups = (1, 1) if shape.batch_invariant else (token_tiles, groups)
    exact = min(MOST_EXACT_COLUMNS) if shape.batch_invariant else MOST_EXACT_COLUMNS[token_tiles - 1]
    sizes = [size for size in FEW_COLUMNS if not shape.precise or size <= exact]

    def cost(columns: int, splits: int) -> tuple[int, int]:
        """Return what the busiest multiprocessor reads, of W and of tokens; and of equals the blocks."""
        clusters = -(-rows // columns) * seen_groups
        rounds = -(-clusters // _clusters(limits, splits))
        return rounds * ((columns + seen_tiles * FEW_TOKENS) * -(-chunks // splits) + ROUND), clusters * splits

    columns, splits = min(((n, c) for n in sizes for c in FEW_SPLITS if c <= chunks), key=lambda one: cost(*one))
    x_rows, share = -(-of_cluster // 8) * 8, -(-chunks // splits)
    x_tile, w_tile = x_rows * GEMM_BLOCK_K * 2, columns * GEMM_BLOCK_K * 2
    x_bytes = min(X_BYTES // x_tile, MOST_X_STAGES, 2 * share) * x_tile
    w_bytes = min((limits.block_smem - ALIGNMENT - room - x_bytes) // w_tile, MOST_W_STAGES, share) * w_tile
    # The last tile of tokens is read as if it had all rows; and sums are of 16 tokens each, a power of two of them.
    least = max(x_bytes - x_tile + token_tiles * FEW_TOKENS * GEMM_BLOCK_K * 2,
                columns * 64 << (-(-of_cluster // 16) - 1).bit_length())  # fmt: skip
    settings = macros_of(shape, BLOCK_N=columns, TOKEN_TILES=token_tiles, FOLDED=folded and 1)
    clusters, threads = -(-rows // columns) * groups, WARPGROUP * token_tiles + (96 if folded else 64)
    return Launch(name, settings, clusters * splits, threads, max(x_bytes + w_bytes, least),
                  overlaps=True, splits=splits, boxes=((boxes[0], x_rows), (boxes[1], columns)))  # fmt: skip


def _project_output_few(config: AttentionConfig, plain: Shape, limits: Limits, tokens: int, room: int) -> Launch:
    """Launch of ``project_output_few_wgmma.cu``."""
    return _few("project_output_few_wgmma", plain, limits, tokens, config.hidden_size, config.q_size,
                ("attention", "o_rows"), room)  # fmt: skip


def projects_few(config: AttentionConfig, shape: Shape, limits: Limits, tokens: int) -> bool:
    """Return whether both projections of so many tokens run on ``project_*_few_wgmma.cu``."""
    fits = config.hidden_size % GEMM_BLOCK_K == 0 and launch.holds_a_row(config, limits)
    weights = (config.q_size + 2 * config.kv_size) * config.hidden_size
    as_lines = tokens == 1 and launch_decode.reads_lines(config, limits)
    many = weights >= MANY_WEIGHTS and not (shape.precise or as_lines)
    enough = tokens >= LEAST_FEW or many
    # With batch_invariant the same kernels must multiply, whatever the batch.
    wanted = shape.batch_invariant or (enough and tokens <= launch.MAX_FEW)
    return limits.wgmma and fits and wanted


def decode(config: AttentionConfig, shape: Shape, limits: Limits, batch: int, seq: int) -> list[Launch]:
    """Return the launches of a call of one token a sequence, or a few: ``launch_decode``'s where these do not fit."""
    first, *middle, last = launch_decode.decode(config, shape, limits, batch, seq)
    tokens = batch * seq
    if not projects_few(config, shape, limits, tokens):
        return [first, *middle, last]
    # Blocks of both fit a multiprocessor: weights are on their way while rows are normalised.
    room = 0 if shape.folded else launch.RESERVED_SMEM + ALIGNMENT
    ahead = [] if shape.folded else [launch.normalise_rows(config, shape, tokens)]
    boxes = ("tokens", "folded_rows") if shape.folded else ("hidden_parts", "qkv_rows")
    rows = config.q_size + 2 * config.kv_size
    first = _few("project_qkv_few_wgmma", shape, limits, tokens, rows, config.hidden_size, boxes, room,
                 folded=shape.folded)  # fmt: skip
    last = _project_output_few(config, launch.plain(shape), limits, tokens, room)
    return [*ahead, first, *middle, last]
