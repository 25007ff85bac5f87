"""The kernels against float64: every published shape and odd ones, norm weights from tame to wild, every stage.

Errors are those of prefill and of single decode steps, without the residual, which would hide them.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
from conftest import make_config, make_hidden, make_weights
from gpu_helpers import HALVES, build_ahead, check, exact, held, kernels_of, make_layer
from layer_helpers import far_scores, in_chunks

import cupy_attn as ca
from cupy_attn import cuda, reference
from cupy_attn.accuracy import BARS, relative_l2
from cupy_attn.arrays import STORAGE_DTYPES, to_numpy
from cupy_attn.bench import MODELS, model_config
from cupy_attn.verify import verify_layer
from cupy_attn.weights import largest_pair_product, multiplies_rest

pytestmark = pytest.mark.gpu

ODD = [  # Hq, Hkv, D, H: every group and head_dim, hidden sizes that are odd multiples of 8
    (2, 2, 16, 24), (20, 1, 16, 8), (6, 2, 64, 72), (5, 1, 80, 136), (14, 2, 96, 200), (16, 1, 128, 264),
    (20, 1, 192, 1032), (3, 1, 192, 56), (8, 8, 256, 104), (7, 1, 256, 1000), (16, 1, 48, 1016), (40, 2, 112, 40),
]  # fmt: skip
TAME, WILD = 5.0, 96.5  # normal and precise path, whatever the head_dim


def odd_config(heads: int, kv_heads: int, head_dim: int, hidden: int, **changes) -> ca.AttentionConfig:
    return make_config(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, hidden_size=hidden,
                       **changes)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _kernels():
    paths = [(dtype, precise) for dtype in HALVES for precise in (False, True)]
    published = [(model_config(name), dtype, precise) for name in MODELS for dtype, precise in paths]
    odd = [(odd_config(*shape), dtype, precise) for shape in ODD for dtype, precise in paths]
    staged = [(config, dtype, precise) for config in STAGED.values() for dtype, precise in paths]
    build_ahead([
        *kernels_of(published, [(1, 1), (1, 130), (1, 257)]),
        *kernels_of(odd, [(2, 1), (2, 60)]),
        *kernels_of([kind for kind in odd if kind[0].head_dim == 64], [(40, 1), (40, 17)]),
        *kernels_of(staged, [(2, 1), (2, 36)]),
        *kernels_of(staged, [(2, 40)], collect=True),
    ])  # fmt: skip


def prefill_and_steps(layer, x, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the output of a prefill of all but the last tokens, and of those fed one at a time."""
    batch, seq, _ = x.shape
    cache = layer.new_cache(batch, seq)
    first = to_numpy(layer(x[:, : seq - steps], cache))
    return first, np.concatenate([to_numpy(layer(x[:, i : i + 1], cache)) for i in range(seq - steps, seq)], 1)


def hold(layer, x, steps: int) -> None:
    """Hold prefill, and decode on its own, to the bars."""
    expected = exact(layer, x)
    prefill, decode = prefill_and_steps(layer, x, steps)
    check(prefill, expected[:, :-steps], layer.dtype)
    check(decode, expected[:, -steps:], layer.dtype)


# Shapes.

PERIOD = 2_000_003  # prime: no two rows of a weight are alike


@functools.lru_cache(maxsize=1)
def large_weights(model: str, dtype: str) -> ca.AttentionWeights:
    """Return random weights of a published shape: numbers from a pool, since drawing 10^8 takes seconds."""
    config, rng = model_config(model), np.random.default_rng(0)
    hidden, rows = config.hidden_size, config.q_size + 2 * config.kv_size

    def matrix(*shape: int) -> np.ndarray:
        pool = rng.standard_normal(PERIOD, np.float32) * np.float32(shape[1] ** -0.5)
        return np.resize(pool.astype(STORAGE_DTYPES[dtype]), shape)

    def norm(size: int) -> np.ndarray:
        return (1 + 0.2 * rng.standard_normal(size)).astype(STORAGE_DTYPES[dtype])

    return ca.AttentionWeights(
        layer=0, input_norm=norm(hidden), qkv_proj=matrix(rows, hidden), q_norm=norm(config.head_dim),
        k_norm=norm(config.head_dim), o_proj=matrix(hidden, config.q_size),
    )  # fmt: skip


def with_k_norm(weights: ca.AttentionWeights, largest: float, spread: float | None = None) -> ca.AttentionWeights:
    """Return weights with that largest |k_norm|, as ``make_weights`` has it; or one peak and such scores."""
    dim, dtype = len(weights.k_norm), weights.k_norm.dtype
    if spread is None:
        body = make_weights(make_config(head_dim=dim), k_norm_max=largest).k_norm
    else:
        body = np.abs(np.random.default_rng(3).standard_normal(dim)).clip(0.1)
        rest = (spread / weights.q_norm_stats.rms) ** 2 * dim - largest**2  # sum of the other squares
        body *= np.sqrt(rest / np.square(body[1:]).sum())
        body[0] = largest
    return dataclasses.replace(weights, k_norm=body.astype(dtype))


def with_one_pair(weights: ca.AttentionWeights, product: float, spread: float) -> ca.AttentionWeights:
    """Return weights whose largest product within a rotated pair is that, and that have such scores."""
    return with_k_norm(weights, product / np.abs(weights.q_norm.astype(np.float64)).reshape(2, -1)[:, 0].max(), spread)


def on_path(weights: ca.AttentionWeights, path: str) -> ca.AttentionWeights:
    """Return weights with a K-norm for the precise path, the normal one, or that without products of the rest."""
    if path == "precise":
        return with_k_norm(weights, WILD)
    if path == "normal":
        return with_k_norm(weights, 6.0, spread=1.5)
    return dataclasses.replace(weights, k_norm=(0.8 * weights.k_norm).astype(weights.k_norm.dtype))


@pytest.mark.parametrize("path", ["small", "normal", "precise"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("model", MODELS)
def test_every_published_shape(model, dtype, path):
    weights = on_path(large_weights(model, dtype), path)
    layer = ca.Attention(model_config(model), weights, dtype, "cuda")
    assert layer.precise is (path == "precise")
    assert multiplies_rest(layer.config, weights.q_norm, weights.k_norm) is (path != "small")
    hold(layer, make_hidden(layer.config, 1, 132, dtype=dtype), steps=2)


@pytest.mark.parametrize("path", ["normal", "precise"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("model", ["0.6B", "8B"])
def test_keys_are_rounded_once(model, dtype, path):
    """To storage: what rounding hidden states to float16 changes of them has products of its own."""
    weights = on_path(large_weights(model, dtype), path)
    config, x = model_config(model), make_hidden(model_config(model), 1, 131, dtype=dtype)
    layer = ca.Attention(config, weights, dtype, "cuda")
    cache = layer.new_cache(1, 131)
    layer(x, cache)
    wide = x.astype(np.float64)
    rms = np.sqrt(np.square(wide).mean(-1, keepdims=True) + config.rms_norm_eps)
    hidden = wide / rms * weights.input_norm.astype(np.float64)
    w_k = weights.qkv_proj[config.q_size : config.q_size + config.kv_size].astype(np.float64)
    once, twice = ((h @ w_k.T).astype(x.dtype) for h in (hidden, hidden.astype(np.float16).astype(np.float64)))
    off, bar = (np.mean(k.reshape(once.shape) != once) for k in (held(cache, 0)[0], twice))
    assert off < bar / 4


@pytest.mark.parametrize("k_norm_max", [TAME, WILD])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", ODD, ids=lambda shape: "-".join(map(str, shape)))
def test_odd_shapes(shape, dtype, k_norm_max):
    layer = make_layer(odd_config(*shape), dtype, k_norm_max=k_norm_max)
    assert layer.precise is (k_norm_max == WILD)
    hold(layer, make_hidden(layer.config, 2, 63, dtype=dtype), steps=3)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("rows", "hidden_size"),
    [*((rows, 72) for rows in (1, 2, 7, 8, 9, 12, 40)), *((rows, 448) for rows in (9, 16, 33, 64, 65, 128, 129))],
)
def test_decode_of_few_and_of_many_sequences(rows, hidden_size, dtype):
    """Up to eight share one read of the weights; more take tiles, Hopper's where columns are multiples of 64."""
    layer = make_layer(odd_config(6, 2, 64, hidden_size, attention_bias=True), dtype)
    hold(layer, make_hidden(layer.config, rows, 20, dtype=dtype), steps=3)


# Norm weights.


@pytest.mark.parametrize("k_norm_max", [1.5, 20.0, 44.5, 96.5, 1000.0])
@pytest.mark.parametrize("dtype", HALVES)
def test_every_size_of_norm_weights(dtype, k_norm_max):
    weights = with_k_norm(large_weights("0.6B", dtype), k_norm_max)
    layer = ca.Attention(model_config("0.6B"), weights, dtype, "cuda")
    x = make_hidden(layer.config, 1, 260, dtype=dtype)
    if k_norm_max > 96.5:
        for y in prefill_and_steps(layer, x, 3):
            assert np.isfinite(y.astype(np.float32)).all()
        return
    hold(layer, x, steps=3)
    if dtype == "bfloat16" and k_norm_max >= 44:
        expected = exact(layer, x, rounded=True)
        chain, _ = reference.forward(layer.config, weights, x, rounding="transformers", angles="float32")
        for got, rows in zip(prefill_and_steps(layer, x, 3), (slice(0, 257), slice(257, 260)), strict=True):
            assert relative_l2(got, expected[:, rows]) <= relative_l2(chain[:, rows], expected[:, rows]) / 4


@pytest.mark.parametrize("spread", [1.0, 2.0, 2.4])
@pytest.mark.parametrize("dtype", HALVES)
def test_the_hardest_weights_that_the_normal_path_is_left(dtype, spread):
    """One pair of dims carries the scores, alone or over a broad rest: little averages its rounding out."""
    weights = large_weights("0.6B", dtype)
    layer = ca.Attention(model_config("0.6B"), with_one_pair(weights, 7.9, spread), dtype, "cuda")
    assert 7.8 < largest_pair_product(layer.weights.q_norm, layer.weights.k_norm) < 8
    assert not layer.precise
    for seed in range(4):
        hold(layer, make_hidden(layer.config, 1, 132, dtype=dtype, seed=seed), steps=2)
    assert ca.Attention(layer.config, with_one_pair(weights, 8.1, spread), dtype, "cuda").precise


@pytest.mark.parametrize("pair_product", [3.6, 3.8, 6.0])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_scores_as_far_apart_as_norm_weights_let_them(dtype, backwards, pair_product):
    """Weights relative to the first scores of a row would be infinite, too large for float16, or nothing in it."""
    config = make_config(hidden_size=128, num_attention_heads=32, num_key_value_heads=16, head_dim=128)
    weights, x = far_scores(config, dtype, pair_product, 697)
    x = np.ascontiguousarray(x[:, ::-1] if backwards else x)
    layer = ca.Attention(config, weights, dtype, "cuda")
    assert not layer.precise
    check(in_chunks(layer, x, [127, 570]), exact(layer, x), dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_wild_norm_weights_need_the_precise_path_and_get_it(dtype):
    weights = with_k_norm(large_weights("0.6B", dtype), WILD)
    x = make_hidden(model_config("0.6B"), 1, 130, dtype=dtype)
    errors = []
    for threshold in (20.0, 1e9):
        config = ca.AttentionConfig.from_dict(model_config("0.6B").to_dict(), precise_threshold=threshold)
        layer = ca.Attention(config, weights, dtype, "cuda")
        assert layer.precise is (threshold == 20.0)
        expected = exact(layer, x, rounded=True)
        prefill, decode = prefill_and_steps(layer, x, 2)
        errors.append((relative_l2(prefill, expected[:, :-2]), relative_l2(decode, expected[:, -2:])))
    precise, normal = errors
    assert max(precise) <= BARS[dtype] / 2
    assert min(normal) >= 2 * max(precise)  # measured: 2.8 in bfloat16, whose normal path splits K's input already


# Stages.

STAGED = {
    "group of 2": make_config(),
    "group of 20": odd_config(20, 1, 80, 136),
    "biases": odd_config(5, 1, 128, 264, attention_bias=True),
    "largest head": odd_config(4, 2, 256, 40),
}


@pytest.mark.parametrize("k_norm_max", [TAME, 44.5, WILD])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", STAGED)
def test_every_stage(kind, dtype, k_norm_max):
    config = STAGED[kind]
    result = verify_layer(make_layer(config, dtype, k_norm_max=k_norm_max), make_hidden(config, 2, 40, dtype=dtype))
    assert result.passed, [row for row in result.reference if not row.passed] + result.collapse
    assert len(result.reference) == 15  # twelve stages, y, its largest error and decode


@pytest.mark.parametrize("dtype", HALVES)
def test_stages_of_a_chunk_and_of_a_step_are_of_the_new_tokens_and_change_no_bit(dtype):
    layer = make_layer(make_config(), dtype)
    x = make_hidden(layer.config, 2, 80, dtype=dtype)
    caches = [layer.new_cache(2, 80) for _ in range(2)]
    for cache in caches:
        layer(x[:, :30], cache)
    for rows in (slice(30, 75), slice(75, 79), slice(79, 80)):
        past = (*(to_numpy(a)[:, : rows.start].copy() for a in (caches[0].k, caches[0].v)),
                caches[0].positions[:, : rows.start])  # fmt: skip
        stages = {}
        y = to_numpy(layer(x[:, rows], caches[0], stages=stages))
        _, want = reference.forward(layer.config, layer.weights, x[:, rows], past=past)
        for name, value in stages.items():
            assert relative_l2(value, want[name]) <= BARS[dtype], name
        check(y, want["output"], dtype)
        plain = to_numpy(layer(x[:, rows], caches[1]))
        if y.shape[1] > 4:  # few tokens that collect take the kernels of a prefill
            assert y.tobytes() == plain.tobytes()


@pytest.mark.parametrize("dtype", HALVES)
def test_stages_of_padding_are_zero(dtype):
    layer = make_layer(make_config(), dtype)
    x = make_hidden(layer.config, 3, 36, dtype=dtype)
    counts = [36, 0, 17]
    for b, count in enumerate(counts):
        x[b, count:] = np.nan
    stages: dict = {}
    y = layer(x, num_tokens=counts, stages=stages)
    assert list(stages) == list(cuda.PREFILL_STAGES)
    for name, value in stages.items():
        value = to_numpy(value)
        assert np.isfinite(value).all(), name
        for b, count in enumerate(counts):
            padding = value[b, :, count:] if name in ("row_max", "lse") else value[b, count:]
            assert not padding.any(), name
    for b, count in enumerate(counts):
        assert not y[b, count:].any()
        if count:
            _, want = reference.forward(layer.config, layer.weights, x[b : b + 1, :count])
            check(y[b : b + 1, :count], want["output"], dtype)
            k = to_numpy(stages["k_rope"])[b : b + 1, :count]
            assert relative_l2(k, want["k_rope"]) <= BARS[dtype]
