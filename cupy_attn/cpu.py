"""The NumPy backend: float32, blocked over queries and keys with the online softmax, every core busy.

Three passes over blocks, each shared out among threads: project (norm, QKV, cache append, Q/K-norm, RoPE), attend,
project back. Scores never exist beyond one block, so memory grows with the tokens, not with their square.
The cache holds K before its norm; the normalised and rotated keys are kept beside it in float32
(``KVCache.rotated``), so that a decode step transforms one key and not all of them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import numpy as np

from . import ops
from .cache import KVCache
from .config import AttentionConfig
from .plan import Plan
from .rope import rope_angles, rope_table
from .threads import run_parallel, take_turn, workers
from .weights import AttentionWeights

THREADED_ROWS = 256  # new tokens from which our own threads beat BLAS's
PROJECT_ROWS = 1024  # rows of one GEMM task: each packs the whole weight again
NORM_ROWS = 64  # rows normalised and rotated at a time, so that they stay in a core's L2
ATTEND_ROWS = 512  # query rows (tokens times group) of one attention task; with ATTEND_KEYS, 1 MB of scores
ATTEND_KEYS = 512
DECODE_KEYS = 4096  # keys of a block when at most DECODE_ROWS rows share it
DECODE_ROWS = 64
# exp(-50) is 2e-22 of the largest weight, nothing in float32; what lies below would turn into subnormals, which
# made a product of nothing else two hundred times slower.
SMALLEST_EXPONENT = np.float32(-50)
LARGEST_EXPONENT = 70.0  # exp(70) summed a million times is still far from float32's largest
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
    batch_invariant : bool
        Never multiply rows of several sequences at once: BLAS picks its kernels, and so its bits, by their number.
    """

    name = "cpu"
    xp = np

    def __init__(
        self, config: AttentionConfig, weights: AttentionWeights, *, angles: str, batch_invariant: bool = False
    ) -> None:
        self.config, self.angles, self.batch_invariant = config, angles, batch_invariant
        self.window = config.window(weights.layer)
        w = {name: np.ascontiguousarray(t, dtype=np.float32) for name, t in weights.tensors().items()}
        self.input_norm = w.pop("input_norm")
        # The norm's weight goes into the projection once, instead of into every row.
        self.qkv_proj = w.pop("qkv_proj") * self.input_norm
        self.w = w

    def forward(self, plan: Plan, cache: KVCache) -> np.ndarray:
        """Run one planned call: write K and V past the cached tokens, return y [B, S, H] in the storage dtype."""
        # Too little work to wake a thread for: BLAS's own, which spin for a while, then share out the products.
        own_threads = self.batch_invariant or int(plan.num_tokens.sum()) >= THREADED_ROWS
        threads = workers() if own_threads else 1
        with take_turn(threads):
            return _Run(self, plan, cache, threads=threads).run()

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
        config = backend.config
        self.backend, self.config, self.w, self.window = backend, config, backend.w, backend.window
        self.plan, self.cache, self.threads = plan, cache, threads
        self.batch_idx, self.seq_idx = np.nonzero(np.arange(plan.seq)[None, :] < plan.num_tokens[:, None])
        self.first_row = np.concatenate([[0], np.cumsum(plan.num_tokens)])
        self.rows = len(self.batch_idx)
        self.x = self._laid_out(plan.x)
        self.residual = None if plan.residual is None else self._laid_out(plan.residual)
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

    def _laid_out(self, x: np.ndarray) -> np.ndarray:
        """Return the valid rows of x [B, S, H] end to end, [rows, H]; a view if there is no padding."""
        flat = x.reshape(-1, x.shape[-1])
        return flat if len(flat) == self.rows else x[self.batch_idx, self.seq_idx]

    def run(self) -> np.ndarray:
        plan, cache = self.plan, self.cache
        y = np.zeros((self.rows, self.config.hidden_size), plan.dtype)
        if self.rows:
            chunks = self._chunks()
            self._rotate_cached()
            run_parallel([functools.partial(self._project, rows) for rows in chunks], self.threads)
            run_parallel(self._attend_tasks(), self.threads)
            self._keep("attention", slice(None), self.q)
            run_parallel([functools.partial(self._project_output, rows, y) for rows in chunks], self.threads)
            cache.rotated_counts[:] = np.where(self.lasting, self.lengths + plan.num_tokens, 0)
        if plan.stages is not None:
            for name, flat in self.stages.items():
                whole = self._padded(flat)
                plan.stages[name] = whole.transpose(0, 2, 1) if name in ("row_max", "lse") else whole
        return self._padded(y)

    def _chunks(self) -> list[slice]:
        """Return rows that are projected together."""
        if self.backend.batch_invariant:
            ends = self.first_row.tolist()
            return [rows for start, stop in itertools.pairwise(ends) for rows in _blocks(start, stop, PROJECT_ROWS)]
        count = self.threads * -(-self.rows // (self.threads * PROJECT_ROWS))
        return _blocks(0, self.rows, -(-self.rows // count))

    def _padded(self, flat: np.ndarray) -> np.ndarray:
        """Return rows [rows, ...] as [B, S, ...], zero where x is padding."""
        shape = (self.plan.batch, self.plan.seq, *flat.shape[1:])
        if self.rows == shape[0] * shape[1]:
            return flat.reshape(shape)
        whole = np.zeros(shape, flat.dtype)
        whole[self.batch_idx, self.seq_idx] = flat
        return whole

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
        cos, sin = (table[self.k_pos[b][part]] for table in self.tables[b])
        self.cache.rotated[b, head, part] = self._norm_and_rotate(k[:, None], self.w["k_norm"], cos, sin)[:, 0]

    def _norm_and_rotate(self, x: np.ndarray, weight: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
        """Return ``apply_rope(rms_norm(x))`` of heads [n, heads, D], in half the passes over memory."""
        half = x.shape[-1] // 2
        out = np.empty(x.shape, np.float32)
        x1, x2, w1, w2 = x[..., :half], x[..., half:], weight[:half], weight[half:]
        # einsum broadcasts over heads 1.6 to 2 times as fast as multiply, whose inner loop is one head's D/2 values.
        np.einsum("nhd,nd->nhd", x1, cos * w1, out=out[..., :half])
        out[..., :half] -= np.einsum("nhd,nd->nhd", x2, sin * w2)
        np.einsum("nhd,nd->nhd", x2, cos * w2, out=out[..., half:])
        out[..., half:] += np.einsum("nhd,nd->nhd", x1, sin * w1)
        out *= _inverse_rms(x, self.config.rms_norm_eps)
        return out

    # Pass 1: x -> h -> q, k, v; k and v to the cache, q and k normalised and rotated.

    def _project(self, rows: slice) -> None:
        h = np.empty((rows.stop - rows.start, self.config.hidden_size), np.float32)
        for part in _blocks(rows.start, rows.stop, NORM_ROWS):
            mine = h[part.start - rows.start : part.stop - rows.start]
            mine[...] = self.x[part]
            mine *= _inverse_rms(mine, self.config.rms_norm_eps)
        if self.stages:
            self._keep("input_norm", rows, h * self.backend.input_norm)
        qkv = ops.project_qkv(h, self.backend.qkv_proj, self.w.get("qkv_bias"))
        for part in _blocks(rows.start, rows.stop, NORM_ROWS):
            self._split(part, qkv[part.start - rows.start : part.stop - rows.start])

    def _split(self, rows: slice, qkv: np.ndarray) -> None:
        """Take projected rows apart: v and k to the cache, q and k on through their norms and RoPE."""
        config, w, cache = self.config, self.w, self.cache
        q, k, v = ops.split_heads(qkv, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        where = (self.batch_idx[rows], slice(None), self.slots[rows])
        cache.k_heads[where], cache.v_heads[where] = k, v
        k = k.astype(cache.dtype, copy=False).astype(np.float32, copy=False)  # what later calls will read
        cos, sin = self._angles(rows)
        self.q[rows] = self._norm_and_rotate(q, w["q_norm"], cos, sin)
        k_rope = self._norm_and_rotate(k, w["k_norm"], cos, sin)
        cache.rotated[where] = k_rope
        if self.stages:
            q_norm, k_norm = ops.qk_norm(q, k, w["q_norm"], w["k_norm"], config.rms_norm_eps)
            v = v.astype(cache.dtype).astype(np.float32)
            made = {
                "q": q,
                "k": k,
                "v": v,
                "q_norm": q_norm,
                "k_norm": k_norm,
                "q_rope": self.q[rows],
                "k_rope": k_rope,
            }
            for name, value in made.items():
                self._keep(name, rows, value)

    def _angles(self, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return cos and sin of new tokens, which may belong to several sequences, [n, D/2] each."""
        batches, positions = self.batch_idx[rows], self.positions[rows]
        if batches[0] == batches[-1]:
            cos, sin = self.tables[batches[0]]
            return cos[positions], sin[positions]
        cos = np.empty((len(positions), self.config.head_dim // 2), np.float32)
        sin = np.empty_like(cos)
        for b in np.unique(batches):
            mine = batches == b
            for out, table in zip((cos, sin), self.tables[b], strict=True):
                out[mine] = table[positions[mine]]
        return cos, sin

    # Pass 2: online softmax, one (sequence, block of queries, KV heads) at a time.

    def _attend_tasks(self) -> list[Callable[[], None]]:
        kv_heads, plan, group = self.config.num_key_value_heads, self.plan, self.config.group
        tasks: list[Callable[[], None]] = []
        for b in range(plan.batch):
            new = int(plan.num_tokens[b])
            block = max(1, ATTEND_ROWS // group)
            sequences = 1 if self.backend.batch_invariant else plan.batch
            if sequences * kv_heads < self.threads:  # too few heads to go round
                block = min(block, -(-new // self.threads))
            blocks = _blocks(0, new, max(block, 1))
            few = new * group <= DECODE_ROWS  # so few rows that call overhead counts: all heads together
            heads = _blocks(0, kv_heads, kv_heads if few else 1)
            shared = self._shared(b) if len(blocks) > 1 else None
            # Longest first: later queries see more keys, and a long task at the end leaves a core idle.
            tasks += [
                functools.partial(self._attend, b, q, h, shared) for q, h in itertools.product(blocks[::-1], heads)
            ]
        return tasks

    def _shared(self, b: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what several blocks of queries will use: values [Hkv, T, D] float32, largest |rotated key| [Hkv]."""
        count = len(self.k_pos[b])
        keys = self.cache.rotated[b, :, :count]
        largest = np.empty(len(keys), np.float32)
        values = (
            np.empty(keys.shape, np.float32) if self.cache.dtype != np.float32 else self.cache.v_heads[b, :, :count]
        )

        def one_head(head: int) -> None:
            largest[head] = np.sqrt(np.einsum("td,td->t", keys[head], keys[head]).max())
            if self.cache.dtype != np.float32:
                values[head] = self.cache.v_heads[b, head, :count]

        run_parallel([functools.partial(one_head, head) for head in range(len(keys))], self.threads)
        return values, largest

    def _attend(self, b: int, queries: slice, kv_heads: slice, shared: tuple[np.ndarray, np.ndarray] | None) -> None:
        """Attend from one block of a sequence's new tokens with all query heads of some KV heads."""
        group, dim = self.config.group, self.config.head_dim
        rows = slice(self.first_row[b] + queries.start, self.first_row[b] + queries.stop)
        heads = slice(kv_heads.start * group, kv_heads.stop * group)
        count, num_kv = queries.stop - queries.start, kv_heads.stop - kv_heads.start
        q = self.q[rows, heads].transpose(1, 0, 2).reshape(num_kv, group * count, dim) * np.float32(dim**-0.5)
        q_pos, k_pos = self.positions[rows], self.k_pos[b]
        stop = int(np.searchsorted(k_pos, q_pos[-1], side="right"))
        start = 0 if self.window is None else int(np.searchsorted(k_pos, q_pos[0] - self.window, side="right"))
        # |q||k| bounds every score: where exp cannot overflow, the row maximum need not be found and subtracted.
        bounded = False
        if shared is not None:
            largest_q = np.sqrt(np.einsum("hrd,hrd->hr", q, q).max())
            bounded = float(largest_q * shared[1][kv_heads].max()) <= LARGEST_EXPONENT

        row_max = np.full((num_kv, group * count, 1), LOWEST, np.float32)
        total = np.zeros_like(row_max)
        out = np.zeros_like(q)
        for part in _blocks(start, stop, DECODE_KEYS if group * count <= DECODE_ROWS else ATTEND_KEYS):
            keys = self.cache.rotated[b, kv_heads, part]
            if shared is None:
                values = self.cache.v_heads[b, kv_heads, part].astype(np.float32, copy=False)
            else:
                values = shared[0][kv_heads, part]
            scores = q @ keys.transpose(0, 2, 1)
            hidden = self._hidden(q_pos, k_pos[part])
            by_query = scores.reshape(num_kv, group, count, -1)
            if hidden is not None:
                np.copyto(by_query, np.float32(-np.inf), where=hidden)
            if bounded:
                if self.stages:
                    row_max = np.maximum(row_max, scores.max(axis=-1, keepdims=True))
                np.exp(scores, out=scores)
            else:
                block_max = np.maximum(row_max, scores.max(axis=-1, keepdims=True))
                np.subtract(scores, block_max, out=scores)
                np.maximum(scores, SMALLEST_EXPONENT, out=scores)
                np.exp(scores, out=scores)
                if hidden is not None:
                    np.copyto(by_query, np.float32(0), where=hidden)
                shrink = np.exp(row_max - block_max)
                total *= shrink
                out *= shrink
                row_max = block_max
            total += scores @ np.ones((part.stop - part.start, 1), np.float32)
            out += scores @ values
        out /= total
        self.q[rows, heads] = out.reshape(num_kv * group, count, dim).transpose(1, 0, 2)
        if self.stages:
            lse = np.log(total) if bounded else row_max + np.log(total)
            for name, value in (("row_max", row_max), ("lse", lse)):
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
        if self.residual is not None:
            out += self.residual[rows].astype(np.float32, copy=False)
        y[rows] = out


def _inverse_rms(x: np.ndarray, eps: float) -> np.ndarray:
    """Return 1 / sqrt(mean(x^2) + eps) over the last axis, kept as an axis of one."""
    mean_square = np.einsum("...d,...d->...", x, x)[..., None] / np.float32(x.shape[-1])
    return np.float32(1) / np.sqrt(mean_square + np.float32(eps))


def _blocks(start: int, stop: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, stop)) for i in range(start, stop, step)]
