"""config.json in both spellings: what is read, what is ignored, what is refused and in which words."""

from __future__ import annotations

import json

import pytest

import cupy_attn as ca
from cupy_attn.config import FULL, SLIDING, RopeConfig

BASE = {
    "model_type": "qwen3", "hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "max_position_embeddings": 4096, "num_hidden_layers": 4,
}  # fmt: skip

# hidden_size, num_attention_heads, num_key_value_heads, num_hidden_layers of the published config.json files.
PUBLISHED = {
    "0.6B": ("qwen3", 1024, 16, 8, 28),
    "1.7B": ("qwen3", 2048, 16, 8, 28),
    "4B": ("qwen3", 2560, 32, 8, 36),
    "8B": ("qwen3", 4096, 32, 8, 36),
    "14B": ("qwen3", 5120, 40, 8, 40),
    "32B": ("qwen3", 5120, 64, 8, 64),
    "30B-A3B": ("qwen3_moe", 2048, 32, 4, 48),
    "235B-A22B": ("qwen3_moe", 4096, 64, 4, 94),
}

ROPE_KINDS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "truncate": False,
             "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 1.0, "mscale_all_dim": 0.5},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 1024},
}  # fmt: skip


def changed(**changes) -> dict:
    """Return BASE with keys changed; ``...`` removes one."""
    return {key: value for key, value in (BASE | changes).items() if value is not ...}


@pytest.mark.parametrize("size", PUBLISHED)
@pytest.mark.parametrize("spelling", ["v4", "v5"])
def test_published_configs_are_read_in_both_spellings(size, spelling):
    model_type, hidden_size, heads, kv_heads, layers = PUBLISHED[size]
    rope = (
        {"rope_theta": 1_000_000, "rope_scaling": None}
        if spelling == "v4"
        else {"rope_parameters": {"rope_theta": 1_000_000, "rope_type": "default"}}
    )
    config = ca.AttentionConfig.from_dict({
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": hidden_size, "max_position_embeddings": 40960, "max_window_layers": layers,
        "model_type": model_type, "num_attention_heads": heads, "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads, "rms_norm_eps": 1e-6, "sliding_window": None, "torch_dtype": "bfloat16",
        "use_cache": True, "use_sliding_window": False, "vocab_size": 151936, "num_experts": 128, **rope,
    })  # fmt: skip
    assert config.hidden_size == hidden_size
    assert (config.num_attention_heads, config.num_key_value_heads) == (heads, kv_heads)
    assert (config.head_dim, config.max_position_embeddings, config.max_position) == (128, 40960, 40960)
    assert (config.q_size, config.kv_size, config.group) == (heads * 128, kv_heads * 128, heads // kv_heads)
    assert config.rope == RopeConfig(rope_theta=1_000_000)
    assert config.num_hidden_layers == layers
    assert not config.attention_bias
    assert [config.window(i) for i in range(layers)] == [None] * layers


@pytest.mark.parametrize("kind", ROPE_KINDS)
def test_both_spellings_of_rope_give_one_config(kind):
    v4_keys = {("type" if k == "rope_type" else k): v for k, v in ROPE_KINDS[kind].items()}
    v4 = ca.AttentionConfig.from_dict(changed(rope_scaling=v4_keys))
    v5 = ca.AttentionConfig.from_dict(
        changed(rope_theta=..., rope_parameters=ROPE_KINDS[kind] | {"rope_theta": 1_000_000.0})
    )
    assert v4 == v5
    assert v4.rope.rope_type == kind
    assert {k: getattr(v4.rope, k) for k in ROPE_KINDS[kind]} == ROPE_KINDS[kind]


def test_both_spellings_together_may_agree():
    rope = ROPE_KINDS["yarn"]
    both = changed(rope_scaling=rope, rope_parameters=rope | {"rope_theta": 1_000_000.0})
    assert ca.AttentionConfig.from_dict(both) == ca.AttentionConfig.from_dict(changed(rope_scaling=rope))


@pytest.mark.parametrize(
    ("rope", "max_position"),
    [
        ({"rope_type": "linear", "factor": 2.0}, 8192),
        ({"rope_type": "dynamic", "factor": 2.5}, 10240),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 16384),
        ({"rope_type": "yarn", "factor": 4.0}, 16384),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024}, 4096),
        ({"rope_type": "yarn", "original_max_position_embeddings": 1024}, 4096),
        (ROPE_KINDS["llama3"], 4096),
    ],
)
def test_max_position_counts_the_stretch(rope, max_position):
    assert ca.AttentionConfig.from_dict(changed(rope_scaling=rope)).max_position == max_position


def test_yarn_factor_defaults_to_the_ratio_of_lengths():
    rope = {"rope_type": "yarn", "original_max_position_embeddings": 1024}
    assert ca.AttentionConfig.from_dict(changed(rope_scaling=rope)).rope.factor == 4.0


def test_defaults_of_absent_keys():
    config = ca.AttentionConfig.from_dict(
        {"hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 1e6}
    )
    assert (config.head_dim, config.rms_norm_eps, config.max_position_embeddings) == (24, 1e-6, 32768)
    assert (config.model_type, config.attention_bias, config.num_hidden_layers) == ("qwen3", False, None)
    assert config.window(1000) is None


def test_head_dim_is_read_and_not_derived():
    assert ca.AttentionConfig.from_dict(changed(head_dim=128)).head_dim == 128
    assert ca.AttentionConfig.from_dict(changed(head_dim=None)).head_dim == 24


def test_null_key_value_heads_mean_one_for_each_query_head():
    config = ca.AttentionConfig.from_dict(changed(num_key_value_heads=None))
    assert (config.num_key_value_heads, config.group) == (4, 1)


def test_attention_bias_is_read():
    assert ca.AttentionConfig.from_dict(changed(attention_bias=True)).attention_bias


def test_precise_threshold_is_an_option():
    assert ca.AttentionConfig.from_dict(BASE).precise_threshold == 20.0
    assert ca.AttentionConfig.from_dict(BASE, precise_threshold=50.0).precise_threshold == 50.0


# Sliding windows.


def windows(**changes) -> list[int | None]:
    config = ca.AttentionConfig.from_dict(changed(**changes))
    return [config.window(i) for i in range(4)]


def test_window_is_off_unless_asked_for():
    assert windows(sliding_window=64) == [None] * 4
    assert windows(sliding_window=64, use_sliding_window=False, max_window_layers=0) == [None] * 4


def test_max_window_layers_is_the_first_that_slides():
    on = {"use_sliding_window": True, "sliding_window": 64}
    assert windows(**on, max_window_layers=2) == [None, None, 64, 64]
    assert windows(**on, max_window_layers=0) == [64] * 4
    assert windows(**on) == [None] * 4  # transformers' default is 28


def test_layer_types_win_over_max_window_layers():
    types = [SLIDING, FULL, SLIDING, FULL]
    assert windows(use_sliding_window=True, sliding_window=64, layer_types=types, max_window_layers=0) == [
        64, None, 64, None,
    ]  # fmt: skip


def test_every_layer_of_a_moe_model_slides():
    assert windows(model_type="qwen3_moe", use_sliding_window=True, sliding_window=64, max_window_layers=3) == [64] * 4


def test_layer_index_is_checked():
    config = ca.AttentionConfig.from_dict(BASE)
    with pytest.raises(ca.ConfigError, match="layer 4 is out of range; the model has layers 0 to 3"):
        config.window(4)
    for bad in (-1, True, 1.0, "0"):
        with pytest.raises(ca.ConfigError, match="integer of at least 0"):
            config.check_layer(bad)


# What is ignored, what is refused.


def test_keys_that_do_not_concern_attention_are_ignored():
    noise = {"vocab_size": 1, "torch_dtype": "bfloat16", "_name_or_path": "x", "hidden_act": "silu"}
    assert ca.AttentionConfig.from_dict(BASE | noise) == ca.AttentionConfig.from_dict(BASE)


def test_unknown_rope_keys_are_ignored_with_a_warning():
    with pytest.warns(ca.IgnoredWarning, match="rope keys colour, shape"):
        config = ca.AttentionConfig.from_dict(changed(rope_scaling={"type": "default", "shape": 1, "colour": 2}))
    assert config == ca.AttentionConfig.from_dict(BASE)


LLAMA3 = ROPE_KINDS["llama3"]
YARN = ROPE_KINDS["yarn"]
ON = {"use_sliding_window": True, "sliding_window": 64}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": ...}, "hidden_size is absent"),
        ({"quantization_config": {"bits": 4}}, "{'bits': 4}, which this package does not run; dequantise"),
        ({"attn_output_gate": True}, "attn_output_gate is True"),
        ({"use_qk_norm": False}, "use_qk_norm is False"),
        ({"layer_types": []}, "layer_types is empty"),
        ({"rope_scaling": {"factor": 4.0}}, "rope has factor 4.0 but rope_type is absent"),
        ({"hidden_size": 0}, "hidden_size is 0; it must be an integer of at least 1"),
        ({"hidden_size": 96.0}, "hidden_size is 96.0"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": "96"}, "hidden_size is '96'"),
        ({"num_attention_heads": ...}, "num_attention_heads is absent"),
        ({"num_attention_heads": None}, "num_attention_heads is None"),
        ({"num_key_value_heads": ...}, "num_key_value_heads is absent"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"head_dim": 31}, "head_dim is 31; RoPE rotates pairs, so it must be even"),
        ({"head_dim": -2}, "head_dim is -2"),
        ({"head_dim": ..., "hidden_size": 97}, "hidden_size 97 is not a multiple of num_attention_heads 4"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0; it must be a finite number greater than 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"max_position_embeddings": "4096"}, "max_position_embeddings is '4096'"),
        ({"max_position_embeddings": "4096", "rope_scaling": YARN}, "max_position_embeddings is '4096'"),
        ({"attention_bias": "false"}, "attention_bias is 'false'; it must be true or false"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2'; this package runs the attention layers of qwen3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"use_sliding_window": 1}, "use_sliding_window is 1; it must be true or false"),
        ({"use_sliding_window": True}, "use_sliding_window is true but sliding_window is absent"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window is 0"),
        (ON | {"max_window_layers": -1}, "max_window_layers is -1"),
        (ON | {"num_hidden_layers": ..., "max_window_layers": 2}, "neither layer_types nor num_hidden_layers"),
        (ON | {"layer_types": "full_attention"}, "it must be a list with one name for each layer"),
        (ON | {"layer_types": [FULL] * 3}, "layer_types has 3 entries and num_hidden_layers is 4"),
        (ON | {"layer_types": [FULL, FULL, FULL, "linear_attention"]}, "layer_types holds 'linear_attention'"),
        ({"layer_types": [FULL, FULL, FULL, SLIDING]}, "no window is in force; set use_sliding_window to true"),
        ({"rope_theta": ...}, "rope_theta is absent"),
        ({"rope_theta": 1.0}, "rope_theta is 1.0; it must be greater than 1"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0; it must be a finite number"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"rope_theta": "1e6"}, "rope_theta is '1e6'"),
        ({"rope_parameters": {"rope_theta": 10000.0}}, "gives rope_theta twice, as 10000.0 and as 1000000.0"),
        ({"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2.0}}, "gives rope_type twice"),
        ({"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 8.0}}, "gives factor twice, as 8.0 and as 4.0"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'; it must be an object or null"),
        ({"rope_parameters": {FULL: {"rope_type": "default"}}}, "nested by layer type"),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope_type 'ntk' is not supported"),
        ({"rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, "long_factor"),
        ({"rope_scaling": {"type": "default", "mrope_section": [1, 1]}}, "mrope_section"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not 1"),
        ({"rope_scaling": {"type": "linear"}}, "rope_type linear needs factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope factor is 0.5"),
        ({"rope_scaling": {"type": "dynamic", "factor": float("inf")}}, "rope factor is inf"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2}, "dynamic has no meaning at head_dim 2"),
        ({"rope_scaling": YARN | {"factor": "4"}}, "rope factor is '4'"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 0}}, "original_max_position_embeddings is 0"),
        ({"rope_scaling": YARN | {"beta_fast": 1.0}}, "beta_fast is 1.0 and beta_slow 2.0"),
        ({"rope_scaling": YARN | {"attention_factor": -1.0}}, "rope attention_factor is -1.0"),
        ({"rope_scaling": YARN | {"truncate": "no"}}, "rope truncate is 'no'; it must be true or false"),
        ({"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "factor"}}, "rope_type llama3 needs factor"),
        ({"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}}, "needs low_freq_factor"),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": None}}, "max_position_embeddings is None"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor must be the larger"),
    ],
)  # fmt: skip
def test_refused_with_the_value_in_the_message(change, words):
    with pytest.raises(ca.ConfigError) as caught:
        ca.AttentionConfig.from_dict(changed(**change))
    assert words in str(caught.value)


@pytest.mark.parametrize("threshold", [0, float("nan"), "20"])
def test_precise_threshold_is_checked(threshold):
    with pytest.raises(ca.ConfigError, match="precise_threshold"):
        ca.AttentionConfig.from_dict(BASE, precise_threshold=threshold)


# To a dict and back.


@pytest.mark.parametrize("kind", ROPE_KINDS)
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"attention_bias": True, "num_hidden_layers": ...},
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": 64, "model_type": "qwen3_moe"},
    ],
)
def test_to_dict_round_trip(kind, change):
    config = ca.AttentionConfig.from_dict(changed(rope_scaling=ROPE_KINDS[kind], **change))
    assert ca.AttentionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("num_hidden_layers", [None, 4])
def test_to_dict_round_trip_of_a_window_for_all_layers(num_hidden_layers):
    """A config built directly may slide in every layer without naming their types."""
    config = ca.AttentionConfig(96, 4, 2, 32, RopeConfig(1e6), sliding_window=64, num_hidden_layers=num_hidden_layers)
    back = ca.AttentionConfig.from_dict(config.to_dict())
    assert [back.window(i) for i in range(4)] == [config.window(i) for i in range(4)] == [64] * 4


# Files.


def test_from_pretrained_takes_the_folder_or_the_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(BASE), encoding="utf-8")
    expected = ca.AttentionConfig.from_dict(BASE)
    assert ca.AttentionConfig.from_pretrained(tmp_path) == expected
    assert ca.AttentionConfig.from_pretrained(str(tmp_path / "config.json")) == expected


def test_from_pretrained_without_a_file(tmp_path):
    with pytest.raises(ca.FileError, match="does not exist; name a model folder"):
        ca.AttentionConfig.from_pretrained(tmp_path)
    with pytest.raises(ca.FileError, match=r"nowhere.*does not exist"):
        ca.AttentionConfig.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"{", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"[1]", "holds a JSON list, not an object"),
        (b"3", "holds a JSON int, not an object"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_from_pretrained_refuses_a_bad_file(tmp_path, data, words):
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(ca.FileError, match=words):
        ca.AttentionConfig.from_pretrained(tmp_path)
