"""Two hundred layers that nobody thought of: shapes, batches, chunks, windows, biases, RoPE kinds and norms by lot."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import make_config, make_hidden
from gpu_helpers import HALVES, build_ahead, check, exact, kernels_of, make_layer

import cupy_attn as ca
from cupy_attn.arrays import to_numpy

pytestmark = pytest.mark.gpu

GROUPS, LAYERS = 10, 20  # tests, and layers of each
HEAD_DIMS = (16, 64, 80, 128)
ROPE_KINDS = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}  # fmt: skip


def draw(seed: int) -> tuple[ca.AttentionConfig, str, float, list[np.ndarray]]:
    """Return a config, a storage dtype, the largest |k_norm| and how many tokens each sequence gets call by call."""
    rng = np.random.default_rng(seed)

    def choose(options):
        return options[int(rng.integers(len(options)))]

    group, kv_heads = choose([1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 20]), choose([1, 1, 2, 3])
    window = choose([None, None, 1, 2, 17, 64, 100])
    config = make_config(
        num_attention_heads=group * kv_heads, num_key_value_heads=kv_heads, head_dim=choose(HEAD_DIMS),
        hidden_size=8 * int(rng.integers(1, 60)), attention_bias=choose([False, False, True]),
        use_sliding_window=window is not None, sliding_window=window, max_window_layers=0,
        rope_scaling=ROPE_KINDS[choose(list(ROPE_KINDS))], rope_theta=choose([1e4, 1e6]),
        rms_norm_eps=choose([1e-6, 1e-5]),
    )  # fmt: skip
    batch = choose([1, 1, 2, 3, 4, 9])
    calls = []
    for _ in range(int(rng.integers(1, 6))):
        most = choose([1, 1, 1, 2, 5, 17, 33, 64, 90])
        counts = np.full(batch, most) if rng.random() < 0.5 else rng.integers(0, most + 1, batch)
        counts[int(rng.integers(batch))] = most
        calls.append(counts)
    return config, choose(HALVES), choose([1.5, 6.0, 20.0, 44.5, 96.5]), calls


@pytest.fixture(scope="module", autouse=True)
def _kernels():
    pairs = []
    for seed in range(GROUPS * LAYERS):
        config, dtype, k_norm_max, calls = draw(seed)
        kinds = [(config, dtype, precise) for precise in ((False, True) if k_norm_max == 20 else (k_norm_max > 20,))]
        shapes = [(len(counts), int(counts.max())) for counts in calls]
        pairs += kernels_of(kinds, shapes, windowed=config.window(0) is not None)
    build_ahead(pairs)


@pytest.mark.parametrize("group", range(GROUPS))
def test_any_layer_is_right(group):
    for seed in range(group * LAYERS, (group + 1) * LAYERS):
        config, dtype, k_norm_max, calls = draw(seed)
        print(seed, config, dtype, k_norm_max, [counts.tolist() for counts in calls])
        layer = make_layer(config, dtype, k_norm_max=k_norm_max, seed=seed)
        batch, totals = len(calls[0]), np.sum(calls, axis=0)
        cache = layer.new_cache(batch, int(totals.max()) + seed % 3)
        tokens = make_hidden(config, batch, int(totals.max()), seed=seed, dtype=dtype)
        got, done = [[] for _ in range(batch)], np.zeros(batch, int)
        for counts in calls:
            seq = counts.max()
            x = np.full((batch, seq, config.hidden_size), np.nan, tokens.dtype)
            for b, count in enumerate(counts):
                x[b, :count] = tokens[b, done[b] : done[b] + count]
            y = to_numpy(layer(x, cache, num_tokens=None if (counts == seq).all() else counts))
            for b, count in enumerate(counts):
                got[b].append(y[b, :count])
                assert not y[b, count:].any()
            done += counts
        assert cache.lengths.tolist() == totals.tolist()
        expected = [exact(layer, tokens[b : b + 1, :n])[0] for b, n in enumerate(totals) if n]
        check(np.concatenate([part for parts in got for part in parts]), np.concatenate(expected), dtype)
