"""The layer on the GPU as separate array operations: for what no kernel takes.

float32 storage, a head_dim that is not a multiple of 16 or above 256, a hidden_size that is not a multiple of 8, and
dynamic RoPE past the length the model was trained for. Products go through cuBLAS.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import ops
from .cache import KVCache
from .config import AttentionConfig
from .errors import DeviceError
from .plan import Plan
from .rope import rope_angles
from .weights import AttentionWeights

SCORE_BYTES = 1 << 30  # materialised scores of one block of queries


class SeparateOps:
    """One layer on the current GPU: float32 arithmetic for 16-bit storage, float64 for float32.

    Parameters
    ----------
    config : AttentionConfig
        Shapes and numerics.
    weights : AttentionWeights
        In the storage dtype.
    angles : {"float64", "float32"}
        Precision of the rotary angles.
    """

    def __init__(self, config: AttentionConfig, weights: AttentionWeights, *, angles: str) -> None:
        import cupy

        self.xp = cupy
        self._config, self._angles = config, angles
        self._window = config.window(weights.layer)
        # One row with scores of several hundred loses 1e-5 in float32: as much as float32 storage may lose in all.
        self._real = np.dtype(np.float64 if weights.dtype == np.float32 else np.float32)
        self._w = {name: cupy.asarray(t).astype(self._real) for name, t in weights.tensors().items()}

    def forward(self, plan: Plan, cache: KVCache) -> Any:
        """Run one planned call: write K and V past the cached tokens, return y [B, S, H] in the storage dtype."""
        try:
            return self._forward(plan, cache)
        except ImportError as error:  # cuBLAS is loaded at the first product
            raise DeviceError(f"a CUDA library is missing ({error}); pip install 'cupy-cuda12x[ctk]'.") from None

    def _forward(self, plan: Plan, cache: KVCache) -> Any:
        xp, config, w = self.xp, self._config, self._w
        y = xp.zeros((plan.batch, plan.seq, config.hidden_size), plan.dtype)
        stages: dict[str, list[Any]] = {}
        for b in range(plan.batch):
            new = int(plan.num_tokens[b])
            if not new:
                continue
            part = self._sequence(plan, cache, b, new)
            out = ops.project_output(part["attention"], w["o_proj"], w.get("o_bias"))
            part["output"] = out
            if plan.residual is not None:
                out = out + plan.residual[b, :new].astype(self._real)
            y[b, :new] = out.astype(plan.dtype)
            for name, value in part.items():
                stages.setdefault(name, []).append((b, value))
        if plan.stages is not None:
            for name, parts in stages.items():
                token_axis = 1 if name in ("row_max", "lse") else 0
                shape = list(parts[0][1].shape)
                shape[token_axis] = plan.seq
                whole = xp.zeros((plan.batch, *shape), np.float32)
                for b, value in parts:
                    rows = slice(0, value.shape[token_axis])
                    whole[(b, rows) if token_axis == 0 else (b, slice(None), rows)] = value
                plan.stages[name] = whole
        cache.advance_device(plan.positions, plan.num_tokens)
        return y

    def _sequence(self, plan: Plan, cache: KVCache, b: int, new: int) -> dict[str, Any]:
        """Run one sequence up to the attention output; return its stages."""
        xp, config, w = self.xp, self._config, self._w
        x = xp.ascontiguousarray(plan.x[b, :new]).astype(self._real)
        h = ops.rms_norm(x, w["input_norm"], config.rms_norm_eps)
        qkv = ops.project_qkv(h, w["qkv_proj"], w.get("qkv_bias"))
        q, k, v = ops.split_heads(qkv, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        start = int(cache.lengths[b])
        rows = slice(start, start + new)
        cache.k_heads[b, :, rows] = k.transpose(1, 0, 2)
        cache.v_heads[b, :, rows] = v.transpose(1, 0, 2)

        keys = cache.k_heads[b, :, : rows.stop].transpose(1, 0, 2).astype(self._real)
        values = cache.v_heads[b, :, : rows.stop].transpose(1, 0, 2).astype(self._real)
        q_pos = plan.positions[b, :new]
        k_pos = cache.key_positions(b, q_pos)
        q_norm, k_norm = ops.qk_norm(q, keys, w["q_norm"], w["k_norm"], config.rms_norm_eps)
        cos, sin = (
            xp.asarray(a, self._real) for a in rope_angles(config, k_pos, int(k_pos[-1]) + 1, angles=self._angles)
        )
        q_rope = ops.apply_rope(q_norm, cos[start:], sin[start:])
        k_rope = ops.apply_rope(k_norm, cos, sin)
        stages = {
            "input_norm": h, "q": q, "k": keys[start:], "v": values[start:], "q_norm": q_norm,
            "k_norm": k_norm[start:], "q_rope": q_rope, "k_rope": k_rope[start:],
        }  # fmt: skip
        return stages | self._attend(q_rope, k_rope, values, q_pos, k_pos, wanted=plan.stages is not None)

    def _attend(self, q: Any, k: Any, v: Any, q_pos: np.ndarray, k_pos: np.ndarray, *, wanted: bool) -> dict[str, Any]:
        """Attend in blocks of queries, so that the scores stay within SCORE_BYTES."""
        xp, config = self.xp, self._config
        step = max(1, SCORE_BYTES // (self._real.itemsize * config.num_attention_heads * len(k_pos)))
        outs, largest, lses = [], [], []
        for i in range(0, len(q_pos), step):
            block, positions = q[None, i : i + step], xp.asarray(q_pos[i : i + step])
            keys = xp.asarray(k_pos)
            outs.append(ops.gqa_attention(block, k[None], v[None], q_positions=positions, k_positions=keys,
                                          sliding_window=self._window)[0])  # fmt: skip
            if wanted:
                row_max, lse = self._row_statistics(block[0], k, positions, keys)
                largest.append(row_max)
                lses.append(lse)
        statistics = {"row_max": xp.concatenate(largest, axis=1), "lse": xp.concatenate(lses, axis=1)} if wanted else {}
        return statistics | {"attention": xp.concatenate(outs)}

    def _row_statistics(self, q: Any, k: Any, q_pos: Any, k_pos: Any) -> tuple[Any, Any]:
        """Return the largest score and ln sum exp(scores) of every row, [Hq, S] each."""
        xp, config, real = self.xp, self._config, self._real.type
        wide = xp.repeat(k, config.group, axis=1)
        scores = xp.einsum("shd,thd->hst", q, wide) * real(config.head_dim**-0.5)
        visible = k_pos[None, :] <= q_pos[:, None]
        if self._window is not None:
            visible &= q_pos[:, None] - k_pos[None, :] < self._window
        scores = xp.where(visible, scores, real(-np.inf))
        row_max = scores.max(-1)
        return row_max, row_max + xp.log(xp.exp(scores - row_max[..., None]).sum(-1))
