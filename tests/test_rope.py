"""Rotary frequencies against transformers (kept numbers and live), angles against high-precision arithmetic."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext

import numpy as np
import pytest
from conftest import make_config

import cupy_attn as ca
from cupy_attn.rope import RopeTable, inverse_frequencies, rope_angles, rope_table

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
KINDS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": YARN,
    "yarn, attention_factor": YARN | {"attention_factor": 0.75},
    "yarn, betas": YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
    "yarn, not truncated": YARN | {"truncate": False},
    "yarn, mscale": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn, no stretch": YARN | {"factor": 1.0},
    "llama3": LLAMA3,
}

# transformers 5.23.0, torch 2.13.0 on a CPU, printed with %.9g (so each is the exact float32):
#   config = Qwen3Config(hidden_size=1024, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
#                        max_position_embeddings=40960, rope_parameters={"rope_theta": 1e6, **KINDS[kind]})
#   inv_freq, factor = ROPE_INIT_FUNCTIONS[kind](config, seq_len=seq_len); inv_freq[[1, 20, 27, 33, 40, 63]]
# ("default": Qwen3RotaryEmbedding.compute_default_rope_parameters). Pairs 20 and below are untouched by yarn here,
# 27 and 33 lie on its ramp, 40 and above are divided by the whole factor.
PAIRS = [1, 20, 27, 33, 40, 63]
KEPT = [
    ("default", None, [0.805842221, 0.0133352149, 0.00294272718, 0.000805842225, 0.00017782794, 1.24093776e-06], 1.0),
    ("linear", None, [0.40292111, 0.00666760746, 0.00147136359, 0.000402921112, 8.89139701e-05, 6.20468882e-07], 1.0),
    ("dynamic", None, [0.805842221, 0.0133352149, 0.00294272718, 0.000805842225, 0.00017782794, 1.24093776e-06], 1.0),
    ("dynamic", 1, [0.805842221, 0.0133352149, 0.00294272718, 0.000805842225, 0.00017782794, 1.24093776e-06], 1.0),
    ("dynamic", 40960, [0.805842221, 0.0133352149, 0.00294272718, 0.000805842225, 0.00017782794, 1.24093776e-06], 1.0),
    ("dynamic", 40961, [0.805840909, 0.0133348014, 0.00294260401, 0.000805800955, 0.000177816924, 1.24081657e-06], 1.0),
    ("dynamic", 163840, [0.773692429, 0.00590700284, 0.000980269979, 0.000210259619, 3.48926842e-05, 9.54567554e-08],
     1.0),
    ("yarn", None, [0.805842221, 0.0133352149, 0.00242342241, 0.000450323569, 4.44569851e-05, 3.10234441e-07],
     1.138629436111989),
    ("yarn, attention_factor", None,
     [0.805842221, 0.0133352149, 0.00242342241, 0.000450323569, 4.44569851e-05, 3.10234441e-07], 0.75),
    ("yarn, betas", None, [0.805842221, 0.0133352149, 0.00274208654, 0.000421235716, 4.44569851e-05, 3.10234441e-07],
     1.138629436111989),
    ("yarn, not truncated", None,
     [0.805842221, 0.0133352149, 0.00247477763, 0.000451830361, 4.44569851e-05, 3.10234441e-07], 1.138629436111989),
    ("yarn, mscale", None, [0.805842221, 0.0133352149, 0.00242342241, 0.000450323569, 4.44569851e-05, 3.10234441e-07],
     1.0648216253695715),
    ("llama3", None, [0.805842221, 0.0133352149, 0.00280258455, 0.000112636066, 2.22284925e-05, 1.5511722e-07], 1.0),
]  # fmt: skip


def config_of(kind: str, **changes) -> ca.AttentionConfig:
    return make_config(**{"head_dim": 128, "max_position_embeddings": 40960, "rope_scaling": KINDS[kind]} | changes)


@pytest.mark.parametrize(("kind", "seq_len", "expected", "factor"), KEPT)
def test_frequencies_against_kept_numbers(kind, seq_len, expected, factor):
    inv_freq, got_factor = inverse_frequencies(config_of(kind), seq_len)
    assert inv_freq.dtype == np.float64
    assert inv_freq.shape == (64,)
    assert got_factor == pytest.approx(factor, rel=1e-15)
    # Several float32 roundings in the expected numbers; lengths 40960 and 40961 are 1.6e-6 apart.
    np.testing.assert_allclose(inv_freq[PAIRS], expected, rtol=4e-7)


@pytest.mark.parametrize(("kind", "seq_len", "expected", "factor"), KEPT)
def test_float32_frequencies_against_kept_numbers(kind, seq_len, expected, factor):
    inv_freq, _ = inverse_frequencies(config_of(kind), seq_len, angles="float32")
    assert inv_freq.dtype == np.float32
    np.testing.assert_array_max_ulp(inv_freq[PAIRS], np.array(expected, np.float32), maxulp=2)


def test_unknown_precision_is_refused():
    with pytest.raises(ca.InputError, match="angles is 'float16'; it must be one of float64, float32"):
        inverse_frequencies(config_of("default"), angles="float16")
    with pytest.raises(ca.InputError, match="angles is 'half'"):
        rope_angles(config_of("default"), [0], angles="half")


# Live against transformers.


def their_config(kind: str, head_dim: int, max_positions: int):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    return transformers.Qwen3Config(
        hidden_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=head_dim, num_hidden_layers=4,
        max_position_embeddings=max_positions, rope_parameters={"rope_theta": 1e6, **KINDS[kind]},
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [16, 80, 128])
def test_frequencies_against_transformers(kind, head_dim):
    theirs = their_config(kind, head_dim, 40960)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    name = KINDS[kind]["rope_type"]
    init = ROPE_INIT_FUNCTIONS.get(name) or Qwen3RotaryEmbedding.compute_default_rope_parameters
    for seq_len in (None,) if name != "dynamic" else (None, 100, 40960, 40961, 100_000):
        expected, factor = init(theirs, seq_len=seq_len)
        ours = config_of(kind, head_dim=head_dim)
        inv_freq, got_factor = inverse_frequencies(ours, seq_len)
        assert got_factor == pytest.approx(factor, rel=1e-15)
        np.testing.assert_allclose(inv_freq, expected.numpy(), rtol=6e-7)
        single, _ = inverse_frequencies(ours, seq_len, angles="float32")
        np.testing.assert_array_max_ulp(single, expected.numpy(), maxulp=2)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_angles_against_transformers(kind):
    theirs = their_config(kind, 128, 4096)
    import torch
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    positions = np.array([0, 1, 2, 63, 64, 1000, 4095, 5000])
    cos, sin = Qwen3RotaryEmbedding(theirs)(torch.zeros(1), torch.from_numpy(positions)[None])
    ours = config_of(kind, max_position_embeddings=4096)
    got = rope_angles(ours, positions, seq_len=int(positions[-1]) + 1, angles="float32")
    for mine, other in zip(got, (cos, sin), strict=True):
        assert mine.dtype == np.float32
        other = other[0].numpy()
        np.testing.assert_array_equal(other[:, :64], other[:, 64:])
        # An ulp of a frequency is 6e-8 of an angle of up to 5000 rad; most frequencies agree bit for bit.
        difference = np.abs(mine - other[:, :64])
        assert difference.max() < 5000 * 2.0**-23
        assert np.median(difference) < 2.0**-24


def test_float64_angles_are_what_float32_lacks():
    """transformers' float32 angle at position 130,000 is off by several thousandths of a radian; ours is not."""
    config = config_of("default", max_position_embeddings=200_000)
    exact, _ = rope_angles(config, [130_000])
    single, _ = rope_angles(config, [130_000], angles="float32")
    assert 1e-3 < np.abs(exact - single).max() < 2e-2


# Exact angles.

PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494")


def exact_angle(theta: float, head_dim: int, pair: int, position: int, divisor: int = 1) -> float:
    """Return position * theta^(-2 pair / D) / divisor reduced to [0, 2 pi), from 50 decimal digits."""
    getcontext().prec = 50
    inv_freq = (-Decimal(2 * pair) / Decimal(head_dim) * Decimal(theta).ln()).exp() / divisor
    return float(position * inv_freq % (2 * PI))


@pytest.mark.parametrize(("theta", "head_dim"), [(1e6, 128), (1e6, 80), (5e5, 80), (1e4, 64), (1e7, 2)])
@pytest.mark.parametrize("kind", ["default", "linear"])
def test_angles_at_position_one_million(theta, head_dim, kind):
    config = config_of(kind, rope_theta=theta, head_dim=head_dim, max_position_embeddings=2_000_000)
    for position in (1_000_000, 999_983):
        cos, sin = rope_angles(config, [position])
        for pair in range(head_dim // 2):
            expected = exact_angle(theta, head_dim, pair, position, 2 if kind == "linear" else 1)
            off = math.remainder(math.atan2(sin[0, pair], cos[0, pair]) - expected, 2 * math.pi)
            assert abs(off) < 1e-9, (position, pair)


def test_angles_keep_the_shape_of_positions_and_the_attention_factor():
    config = config_of("yarn")
    positions = np.arange(6).reshape(2, 3)
    cos, sin = rope_angles(config, positions)
    assert cos.shape == sin.shape == (2, 3, 64)
    np.testing.assert_allclose(np.hypot(cos, sin), 0.1 * math.log(4) + 1, rtol=1e-14)
    np.testing.assert_array_equal(cos[1, 2], rope_angles(config, 5)[0])


# The table.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("angles", ["float64", "float32"])
def test_table_grows_and_equals_the_angles(kind, angles):
    config = config_of(kind, max_position_embeddings=3000)
    table = RopeTable(config, angles)
    lengths = []
    for count in (1, 10, 1024, 1025, 2999):
        cos, sin = table.upto(count)
        assert len(cos) == len(sin) >= count
        lengths.append(len(cos))
    assert lengths[0] < lengths[-1]
    expected = rope_angles(config, np.arange(len(cos)), angles=angles)
    for got, want in zip((cos, sin), expected, strict=True):
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, want.astype(np.float32))
    assert table.upto(5)[0] is cos  # shrinking never happens, nor does a copy


def test_tables_are_shared_between_equal_configs():
    assert rope_table(config_of("yarn")) is rope_table(config_of("yarn"))
    assert rope_table(config_of("yarn")) is not rope_table(config_of("yarn, betas"))
    assert rope_table(config_of("yarn")) is not rope_table(config_of("yarn"), "float32")
