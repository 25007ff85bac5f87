"""The NumPy backend: float32, blocked over queries and keys with the online softmax, every core busy.

Three passes over blocks, each shared out among threads: project (norm, QKV, cache append, Q/K-norm, RoPE), attend,
project back. Scores never exist beyond one block, so memory grows with the tokens, not with their square.
The cache holds K before its norm; the normalised and rotated keys are kept beside it in float32
(``KVCache.rotated``), so that a decode step transforms one key and not all of them.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from . import ops
from .cache import KVCache
from .config import AttentionConfig
from .plan import Plan
from .rope import rope_angles, rope_table
from .weights import AttentionWeights

THREADED_ROWS = 256  # new tokens from which our own threads beat BLAS's: each task packs the whole weight again
PROJECT_ROWS = 256  # rows of one GEMM task: 256 x 1024 float32 is half of a core's L2
ATTEND_ROWS = 512  # query rows (tokens times group) of one attention task; with ATTEND_KEYS, 1 MB of scores
ATTEND_KEYS = 512
DECODE_KEYS = 4096  # keys of a block when at most DECODE_ROWS rows share it
DECODE_ROWS = 64
# exp(-50) is 2e-22 of the largest weight, nothing in float32; what lies below would turn into subnormals, which
# make a product with them twenty times slower.
SMALLEST_EXPONENT = np.float32(-50)
LOWEST = np.finfo(np.float32).min  # a finite start for row maxima: -inf - -inf would be NaN


class CpuBackend:
    """One layer on the CPU.

    Parameters
    ----------
    config : AttentionConfig
        Shapes and numerics.
    weights : AttentionWeights
        In the storage dtype; kept as float32 copies.
    angles : {"float64", "float32"}
        Precision of the rotary angles.
    """

    name = "cpu"
    xp = np

    def __init__(self, config: AttentionConfig, weights: AttentionWeights, *, angles: str) -> None:
        self.config, self.angles = config, angles
        self.window = config.window(weights.layer)
        self.w = {name: np.ascontiguousarray(t, dtype=np.float32) for name, t in weights.tensors().items()}

    def forward(self, plan: Plan, cache: KVCache) -> np.ndarray:
        """Run one planned call: write K and V past the cached tokens, return y [B, S, H] in the storage dtype."""
        if int(plan.num_tokens.sum()) < THREADED_ROWS:
            # Too little work to wake a thread for: BLAS's own, which spin for a while, share out the products.
            return _Run(self, plan, cache, threads=1).run()
        with _one_blas_thread():
            return _Run(self, plan, cache, threads=workers()).run()

    def angle_tables(self, seq_len: int) -> tuple[np.ndarray, np.ndarray, bool]:
        """Return cos and sin, float32 [>= seq_len, D/2], and whether they hold for longer sequences too."""
        config = self.config
        if config.rope.rope_type == "dynamic" and seq_len > config.max_position_embeddings:
            cos, sin = rope_angles(config, np.arange(seq_len), seq_len, angles=self.angles)
            return cos.astype(np.float32), sin.astype(np.float32), False
        return *rope_table(config, self.angles).upto(seq_len), True


class _Run:
    """The state of one call. Valid tokens of all sequences are laid end to end: row n is token (batch, seq) of it."""

    def __init__(self, backend: CpuBackend, plan: Plan, cache: KVCache, *, threads: int) -> None:
        config, self.threads = backend.config, threads
        self.config, self.w, self.window, self.plan, self.cache = (
            config,
            backend.w,
            backend.window,
            plan,
            cache,
        )
        self.batch_idx, self.seq_idx = np.nonzero(np.arange(plan.seq)[None, :] < plan.num_tokens[:, None])
        self.first_row = np.concatenate([[0], np.cumsum(plan.num_tokens)])
        self.rows = len(self.batch_idx)
        self.positions = plan.positions[self.batch_idx, self.seq_idx]
        self.lengths = cache.lengths
        self.slots = self.lengths[self.batch_idx] + self.seq_idx
        self.k_pos = [cache.key_positions(b, plan.positions[b, : plan.num_tokens[b]]) for b in range(plan.batch)]
        seq_lens = [int(p[-1]) + 1 if p.size else 0 for p in self.k_pos]
        tables = [backend.angle_tables(n) for n in seq_lens]
        self.tables = [(cos, sin) for cos, sin, _ in tables]
        self.lasting = np.array([lasting for *_, lasting in tables])
        self.kept = cache.keep_rotated(backend, self.lasting)
        # Rotated queries, overwritten head by head with the attention output.
        self.q = np.empty((self.rows, config.num_attention_heads, config.head_dim), np.float32)
        self.stages = {} if plan.stages is None else self._stage_arrays()

    def run(self) -> np.ndarray:
        plan, cache = self.plan, self.cache
        y = np.zeros((plan.batch, plan.seq, self.config.hidden_size), plan.dtype)
        if self.rows:
            self._rotate_cached()
            chunks = _blocks(0, self.rows, min(PROJECT_ROWS, -(-self.rows // self.threads)))
            run_parallel([functools.partial(self._project, rows) for rows in chunks], self.threads)
            run_parallel(self._attend_tasks(), self.threads)
            self._keep("attention", slice(None), self.q)
            run_parallel([functools.partial(self._project_output, rows, y) for rows in chunks], self.threads)
            cache.rotated_counts[:] = np.where(self.lasting, self.lengths + plan.num_tokens, 0)
        if plan.stages is not None:
            for name, flat in self.stages.items():
                whole = np.zeros((plan.batch, plan.seq, *flat.shape[1:]), np.float32)
                whole[self.batch_idx, self.seq_idx] = flat
                plan.stages[name] = whole.transpose(0, 2, 1) if name in ("row_max", "lse") else whole
        return y

    def _stage_arrays(self) -> dict[str, np.ndarray]:
        config, dim = self.config, self.config.head_dim
        q, kv = (config.num_attention_heads, dim), (config.num_key_value_heads, dim)
        shapes: dict[str, tuple[int, ...]] = {
            "input_norm": (config.hidden_size,), "q": q, "k": kv, "v": kv, "q_norm": q, "k_norm": kv, "q_rope": q,
            "k_rope": kv, "row_max": q[:1], "lse": q[:1], "attention": q, "output": (config.hidden_size,),
        }  # fmt: skip
        return {name: np.empty((self.rows, *shape), np.float32) for name, shape in shapes.items()}

    def _keep(self, name: str, rows: slice, value: np.ndarray, columns: slice = slice(None)) -> None:
        """Store part of a stage, if stages are wanted."""
        if self.stages:
            self.stages[name][rows, columns] = value

    # Pass 0: cached keys that no earlier call has left rotated.

    def _rotate_cached(self) -> None:
        tasks = [
            functools.partial(self._rotate_part, b, head, part)
            for b in range(self.plan.batch)
            for part in _blocks(int(self.kept[b]), int(self.lengths[b]), DECODE_KEYS)
            for head in range(self.config.num_key_value_heads)
        ]
        run_parallel(tasks, self.threads)

    def _rotate_part(self, b: int, head: int, part: slice) -> None:
        k = self.cache.k_heads[b, head, part].astype(np.float32)
        k = ops.rms_norm(k, self.w["k_norm"], self.config.rms_norm_eps)
        cos, sin = (table[self.k_pos[b][part]] for table in self.tables[b])
        self.cache.rotated[b, head, part] = ops.apply_rope(k[:, None], cos, sin)[:, 0]

    # Pass 1: x -> h -> q, k, v; k and v to the cache, q and k normalised and rotated.

    def _project(self, rows: slice) -> None:
        config, w, cache = self.config, self.w, self.cache
        x = self.plan.x[self.batch_idx[rows], self.seq_idx[rows]].astype(np.float32, copy=False)
        h = ops.rms_norm(x, w["input_norm"], config.rms_norm_eps)
        qkv = ops.project_qkv(h, w["qkv_proj"], w.get("qkv_bias"))
        q, k, v = ops.split_heads(qkv, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        where = (self.batch_idx[rows], slice(None), self.slots[rows])
        cache.k_heads[where], cache.v_heads[where] = k, v
        k = k.astype(cache.dtype, copy=False).astype(np.float32, copy=False)  # what later calls will read
        q_norm, k_norm = ops.qk_norm(q, k, w["q_norm"], w["k_norm"], config.rms_norm_eps)
        cos, sin = self._angles(rows)
        q_rope, k_rope = ops.apply_rope(q_norm, cos, sin), ops.apply_rope(k_norm, cos, sin)
        self.q[rows] = q_rope
        cache.rotated[where] = k_rope
        if self.stages:
            v = v.astype(cache.dtype).astype(np.float32)
            made = {
                "input_norm": h,
                "q": q,
                "k": k,
                "v": v,
                "q_norm": q_norm,
                "k_norm": k_norm,
                "q_rope": q_rope,
                "k_rope": k_rope,
            }
            for name, value in made.items():
                self._keep(name, rows, value)

    def _angles(self, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return cos and sin of new tokens, which may belong to several sequences, [n, D/2] each."""
        batches, positions = self.batch_idx[rows], self.positions[rows]
        cos = np.empty((len(positions), self.config.head_dim // 2), np.float32)
        sin = np.empty_like(cos)
        for b in np.unique(batches):
            mine = batches == b
            for out, table in zip((cos, sin), self.tables[b], strict=True):
                out[mine] = table[positions[mine]]
        return cos, sin

    # Pass 2: online softmax, one (sequence, block of queries, KV heads) at a time.

    def _attend_tasks(self) -> list[Callable[[], None]]:
        kv_heads, plan = self.config.num_key_value_heads, self.plan
        tasks: list[Callable[[], None]] = []
        for b in range(plan.batch):
            new = int(plan.num_tokens[b])
            block = max(1, ATTEND_ROWS // self.config.group)
            if plan.batch * kv_heads < self.threads:  # too few heads to go round
                block = min(block, -(-new // self.threads))
            blocks = _blocks(0, new, max(block, 1))
            values = self._float32_values(b) if len(blocks) > 1 else None
            few = new * self.config.group <= DECODE_ROWS  # so few that heads go together, call overhead counts
            heads = _blocks(0, kv_heads, kv_heads if few else 1)
            # Longest first: later queries see more keys, and a long task at the end leaves a core idle.
            tasks += [functools.partial(self._attend, b, q, h, values) for q in reversed(blocks) for h in heads]
        return tasks

    def _float32_values(self, b: int) -> np.ndarray:
        """Return the values of one sequence [Hkv, T, D]; several blocks of queries will read them."""
        values = self.cache.v_heads[b, :, : len(self.k_pos[b])]
        return values.astype(np.float32, copy=False)

    def _attend(self, b: int, queries: slice, kv_heads: slice, all_values: np.ndarray | None) -> None:
        """Attend from one block of a sequence's new tokens with all query heads of some KV heads."""
        group, dim = self.config.group, self.config.head_dim
        rows = slice(self.first_row[b] + queries.start, self.first_row[b] + queries.stop)
        heads = slice(kv_heads.start * group, kv_heads.stop * group)
        count, num_kv = queries.stop - queries.start, kv_heads.stop - kv_heads.start
        q = self.q[rows, heads].transpose(1, 0, 2).reshape(num_kv, group * count, dim) * np.float32(dim**-0.5)
        q_pos, k_pos = self.positions[rows], self.k_pos[b]
        stop = int(np.searchsorted(k_pos, q_pos[-1], side="right"))
        start = 0 if self.window is None else int(np.searchsorted(k_pos, q_pos[0] - self.window, side="right"))

        largest = np.full((num_kv, group * count, 1), LOWEST, np.float32)
        total = np.zeros_like(largest)
        out = np.zeros_like(q)
        for part in _blocks(start, stop, DECODE_KEYS if group * count <= DECODE_ROWS else ATTEND_KEYS):
            keys = self.cache.rotated[b, kv_heads, part]
            if all_values is None:
                values = self.cache.v_heads[b, kv_heads, part].astype(np.float32, copy=False)
            else:
                values = all_values[kv_heads, part]
            scores = q @ keys.transpose(0, 2, 1)
            by_query = scores.reshape(num_kv, group, count, -1)
            hidden = self._hidden(q_pos, k_pos[part])
            if hidden is not None:
                np.copyto(by_query, np.float32(-np.inf), where=hidden)
            block_max = np.maximum(largest, scores.max(axis=-1, keepdims=True))
            np.subtract(scores, block_max, out=scores)
            np.maximum(scores, SMALLEST_EXPONENT, out=scores)
            np.exp(scores, out=scores)
            if hidden is not None:
                np.copyto(by_query, np.float32(0), where=hidden)
            shrink = np.exp(largest - block_max)
            total = total * shrink + scores @ np.ones((part.stop - part.start, 1), np.float32)
            out *= shrink
            out += scores @ values
            largest = block_max
        out /= total
        self.q[rows, heads] = out.reshape(num_kv * group, count, dim).transpose(1, 0, 2)
        if self.stages:
            for name, value in (("row_max", largest), ("lse", largest + np.log(total))):
                self._keep(name, rows, value.reshape(num_kv * group, count).T, heads)

    def _hidden(self, q_pos: np.ndarray, k_pos: np.ndarray) -> np.ndarray | None:
        """Return which (query, key) pairs are masked, or None if none is."""
        causal = k_pos[-1] > q_pos[0]
        slides = self.window is not None and q_pos[-1] - k_pos[0] >= self.window
        if not causal and not slides:
            return None
        hidden = k_pos[None, :] > q_pos[:, None]
        if slides:
            hidden |= q_pos[:, None] - k_pos[None, :] >= self.window
        return hidden

    # Pass 3: concat -> output projection (+ bias) (+ residual), one rounding.

    def _project_output(self, rows: slice, y: np.ndarray) -> None:
        out = ops.project_output(self.q[rows], self.w["o_proj"], self.w.get("o_bias"))
        self._keep("output", rows, out)
        where = (self.batch_idx[rows], self.seq_idx[rows])
        if self.plan.residual is not None:
            out += self.plan.residual[where].astype(np.float32, copy=False)
        y[where] = out


def _blocks(start: int, stop: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, stop)) for i in range(start, stop, step)]


def workers() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(workers() - 1, 1), thread_name_prefix="cupy_attn")


if hasattr(os, "register_at_fork"):  # a forked child has the pool object but not its threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


def run_parallel(tasks: Iterable[Callable[[], None]], threads: int) -> None:
    """Run independent tasks on this and ``threads - 1`` more threads, in the order given.

    The first exception, Ctrl-C included, drops the tasks not yet begun and is raised when none is running.
    """
    queue = deque(tasks)

    def drain() -> None:
        while True:
            try:
                task = queue.popleft()
            except IndexError:
                return
            try:
                task()
            except BaseException:
                queue.clear()
                raise

    helpers: list[Future[None]] = [_pool().submit(drain) for _ in range(min(threads, len(queue)) - 1)]
    try:
        drain()
    finally:  # after Ctrl-C too: no task outlives the call
        for helper in helpers:
            helper.cancel() or helper.exception()
    for helper in helpers:
        if not helper.cancelled():
            helper.result()


_blas_lock = threading.Lock()
_blas_users = 0
_blas_limit: Any = None


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")


@contextlib.contextmanager
def _one_blas_thread() -> Iterator[None]:
    """Keep BLAS on one thread a call: our own threads each run one, and two pools would fight for the cores."""
    global _blas_users, _blas_limit
    with _blas_lock:
        _blas_users += 1
        if _blas_users == 1:
            _blas_limit = _blas().limit(limits=1)
    try:
        yield
    finally:
        with _blas_lock:
            _blas_users -= 1
            if _blas_users == 0:
                _blas_limit.restore_original_limits()
