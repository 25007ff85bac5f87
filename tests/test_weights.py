"""Checkpoints in, one layer out: which tensors are read, what a conversion loses, and every way a file can be bad."""

from __future__ import annotations

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from conftest import make_config, make_weights
from safetensors.numpy import save_file

import cupy_attn as ca
from cupy_attn import weights as weights_module
from cupy_attn.weights import (
    INDEX_NAME,
    SINGLE_NAME,
    largest_pair_product,
    multiplies_rest,
    read_norms,
    takes_precise_path,
)

BFLOAT16 = ml_dtypes.bfloat16
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": BFLOAT16}


def make_tensors(config, *, layers=2, head="model.", dtype="float32") -> dict[str, np.ndarray]:
    """Return a checkpoint's tensors: the attention layers, and others that no attention layer needs."""
    tensors = {f"{head}embed_tokens.weight": np.zeros((8, config.hidden_size), np.float32)}
    for layer in range(layers):
        weights = make_weights(config, seed=layer, layer=layer, dtype=dtype)
        tensors |= weights.to_dict(config, prefix=f"{head}layers.{layer}.")
        tensors[f"{head}layers.{layer}.mlp.up_proj.weight"] = np.zeros((4, config.hidden_size), np.float32)
    return tensors


def save_model(folder, config, tensors, *, shards=1):
    """Write config.json and the tensors, in one file or spread over several with an index."""
    (folder / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    if shards == 1:
        save_file(tensors, folder / SINGLE_NAME)
        return folder
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {tensor: names[i % shards] for i, tensor in enumerate(sorted(tensors))}
    for name in names:
        save_file({t: tensors[t] for t in tensors if weight_map[t] == name}, folder / name)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return folder


def assert_same(a: ca.AttentionWeights, b: ca.AttentionWeights) -> None:
    assert a.layer == b.layer
    assert a.tensors().keys() == b.tensors().keys()
    for name, tensor in a.tensors().items():
        assert tensor.dtype == b.tensors()[name].dtype
        np.testing.assert_array_equal(tensor.view(np.uint8), b.tensors()[name].view(np.uint8), err_msg=name)


# What is read.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_from_pretrained_gives_the_stored_tensors(tmp_path, dtype, shards, bias):
    config = make_config(attention_bias=bias)
    save_model(tmp_path, config, make_tensors(config, dtype=dtype), shards=shards)
    for layer in range(2):
        weights = ca.AttentionWeights.from_pretrained(tmp_path, layer)
        assert weights.dtype == DTYPES[dtype]
        assert not weights.losses
        expected = make_weights(config, seed=layer, layer=layer, dtype=dtype)
        assert_same(weights, ca.AttentionWeights.from_dict(expected.to_dict(config), config, layer=layer))
        assert (weights.qkv_bias is not None, weights.o_bias is not None) == (bias, bias)


def test_one_file_can_be_named_with_a_config(tmp_path):
    config = make_config()
    save_file(make_tensors(config), tmp_path / "anything.safetensors")
    weights = ca.AttentionWeights.from_pretrained(tmp_path / "anything.safetensors", 1, config=config)
    assert_same(weights, make_weights(config, seed=1, layer=1))


@pytest.mark.parametrize("head", ["model.", "", "model.language_model."])
def test_names_with_and_without_model(tmp_path, head):
    config = make_config()
    save_model(tmp_path, config, make_tensors(config, head=head))
    assert_same(ca.AttentionWeights.from_pretrained(tmp_path, 1), make_weights(config, seed=1, layer=1))


@pytest.mark.parametrize("prefix", ["", "layers.3.", "model.layers.3."])
def test_a_dict_of_one_layer(prefix):
    config = make_config()
    weights = make_weights(config, layer=3)
    assert_same(ca.AttentionWeights.from_dict(weights.to_dict(config, prefix=prefix), config, layer=3), weights)


def test_to_dict_names_are_those_of_the_checkpoint():
    config = make_config(attention_bias=True)
    names = set(make_weights(config, layer=2).to_dict(config))
    expected = {f"model.layers.2.self_attn.{p}_proj.{kind}" for p in "qkvo" for kind in ("weight", "bias")}
    expected |= {f"model.layers.2.self_attn.{p}_norm.weight" for p in "qk"}
    assert names == expected | {"model.layers.2.input_layernorm.weight"}


def test_qkv_rows_are_q_then_k_then_v():
    config = make_config()
    weights = make_weights(config)
    tensors = weights.to_dict(config, prefix="")
    joined = np.concatenate([tensors[f"self_attn.{p}_proj.weight"] for p in "qkv"])
    np.testing.assert_array_equal(weights.qkv_proj, joined)
    assert tensors["self_attn.q_proj.weight"].shape == (config.q_size, config.hidden_size)


def test_mixed_dtypes_meet_without_a_loss():
    config = make_config()
    wide = make_weights(config).to_dict(config, prefix="")
    mixed = dict(wide)
    mixed["self_attn.q_proj.weight"] = wide["self_attn.q_proj.weight"].astype(np.float16)
    mixed["self_attn.k_proj.weight"] = wide["self_attn.k_proj.weight"].astype(BFLOAT16)
    mixed["self_attn.v_proj.weight"] = wide["self_attn.v_proj.weight"].astype(BFLOAT16)
    mixed["self_attn.k_norm.weight"] = wide["self_attn.k_norm.weight"].astype(BFLOAT16)
    weights = ca.AttentionWeights.from_dict(mixed, config)
    assert (weights.dtype, weights.k_norm.dtype, weights.o_proj.dtype) == (np.float32, BFLOAT16, np.float32)
    exact = np.concatenate([mixed[f"self_attn.{p}_proj.weight"].astype(np.float64) for p in "qkv"])
    np.testing.assert_array_equal(weights.qkv_proj.astype(np.float64), exact)


@pytest.mark.parametrize("shards", [1, 3])
def test_only_the_tensors_of_the_layer_are_read_and_each_once(tmp_path, monkeypatch, shards):
    config = make_config()
    save_model(tmp_path, config, make_tensors(config, layers=3), shards=shards)
    read = []
    original = weights_module._Checkpoint.__getitem__
    monkeypatch.setattr(
        weights_module._Checkpoint, "__getitem__", lambda self, name: (read.append(name), original(self, name))[1]
    )
    weights = ca.AttentionWeights.from_pretrained(tmp_path, 1)
    assert sorted(read) == sorted(weights.to_dict(config))


def test_unreadable_tensors_of_other_layers_do_no_harm(tmp_path):
    config = make_config()
    tensors = make_tensors(config)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].astype(np.float64)
    save_model(tmp_path, config, tensors)
    assert_same(ca.AttentionWeights.from_pretrained(tmp_path, 1), make_weights(config, seed=1, layer=1))
    with pytest.raises(ca.WeightsError, match=r"layers\.0\.self_attn\.q_proj\.weight in .* is stored as F64"):
        ca.AttentionWeights.from_pretrained(tmp_path, 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16])
def test_weights_from_torch_tensors(dtype):
    torch = pytest.importorskip("torch")
    config = make_config()
    tensors = make_weights(config, dtype=np.dtype(dtype).name).to_dict(config, prefix="")
    torch_dtype = getattr(torch, np.dtype(dtype).name)
    theirs = {n: torch.from_numpy(t.astype(np.float32)).to(torch_dtype) for n, t in tensors.items()}
    assert_same(ca.AttentionWeights.from_dict(theirs, config), ca.AttentionWeights.from_dict(tensors, config))


# Conversions.


def named_parts(weights, config) -> dict[str, np.ndarray]:
    """Return the tensors by the names losses go by: q, k and v apart."""
    parts = {}
    for name, tensor in weights.tensors().items():
        if name.startswith("qkv"):
            cuts = np.split(tensor, [config.q_size, config.q_size + config.kv_size])
            parts |= {f"{p}{name[3:]}": part for p, part in zip("qkv", cuts, strict=True)}
        else:
            parts[name] = tensor
    return parts


def test_a_small_projection_that_is_lost_does_not_hide_behind_a_large_one():
    config = make_config()
    tensors = make_weights(config).to_dict(config, prefix="")
    tensors["self_attn.q_proj.weight"] *= np.float32(1e-8)
    weights = ca.AttentionWeights.from_dict(tensors, config)
    with pytest.warns(ca.PrecisionWarning, match=r"q_proj: .* set \d+ of \d+ values to zero"):
        converted = weights.astype("float16")
    assert converted.losses["q_proj"].relative > 0.9


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_conversions_of_ordinary_weights_do_not_warn(source, target):
    """Warnings of this package are errors in the tests; float32 to 16 bits rounds nearly every value."""
    config = make_config()
    weights = ca.AttentionWeights.from_dict(make_weights(config, dtype=source).to_dict(config), config)
    converted = weights.astype(target)
    assert {t.dtype for t in converted.tensors().values()} == {np.dtype(DTYPES[target])}
    fewer_bits = (source, target) in {("float32", "float16"), ("float32", "bfloat16"), ("float16", "bfloat16")}
    assert ({"q_proj", "k_proj", "v_proj", "o_proj"} <= set(converted.losses)) == fewer_bits
    before, after = (named_parts(w, config) for w in (weights, converted))
    for name, loss in converted.losses.items():
        change = np.abs(after[name].astype(np.float64) - before[name].astype(np.float64))
        assert loss.size == change.size
        assert loss.rounded == np.count_nonzero(change)
        assert loss.max_abs == pytest.approx(change.max(), rel=1e-6)


def test_bfloat16_to_float16_counts_what_falls_below_the_range():
    config = make_config()
    weights = make_weights(config, dtype="bfloat16")
    k_norm = weights.k_norm.copy()
    k_norm[:3], k_norm[3] = 1e-9, 0
    tensors = weights.to_dict(config, prefix="") | {"self_attn.k_norm.weight": k_norm}
    converted = ca.AttentionWeights.from_dict(tensors, config).astype("float16")
    assert converted.losses["k_norm"].zeroed == 3
    np.testing.assert_array_equal(converted.k_norm[:4], 0)
    assert converted.losses["k_norm"].relative < 1e-9  # three of 32, and tiny: not worth a warning


def test_a_tensor_below_the_range_warns_and_is_counted():
    config = make_config()
    tensors = make_weights(config).to_dict(config, prefix="")
    tensors["self_attn.o_proj.weight"] = np.full_like(tensors["self_attn.o_proj.weight"], 1e-9)
    weights = ca.AttentionWeights.from_dict(tensors, config)
    size = weights.o_proj.size
    with pytest.warns(ca.PrecisionWarning, match=f"layer 0 o_proj.*set {size} of {size} values to zero") as caught:
        converted = weights.astype("float16")
    assert len(caught) == 1
    loss = converted.losses["o_proj"]
    assert (loss.zeroed, loss.rounded, loss.relative) == (size, size, 1.0)
    assert loss.max_abs == pytest.approx(1e-9)
    assert weights.astype("bfloat16").losses["o_proj"].zeroed == 0


def test_values_too_large_for_float16_are_refused():
    config = make_config()
    tensors = make_weights(config).to_dict(config, prefix="")
    tensors["self_attn.k_proj.weight"][3, 5] = -7e4
    tensors["self_attn.k_proj.weight"][4, 5] = 1e5
    weights = ca.AttentionWeights.from_dict(tensors, config)
    with pytest.raises(ca.WeightsError, match=r"k_proj: 2 of \d+ values do not fit float16.*100000"):
        weights.astype("float16")
    assert weights.astype("bfloat16").dtype == BFLOAT16
    with pytest.raises(ca.WeightsError, match="use dtype bfloat16 or float32"):
        ca.Attention(config, weights, "float16", "cpu")


def test_from_pretrained_converts_on_request(tmp_path):
    config = make_config()
    save_model(tmp_path, config, make_tensors(config))
    converted = ca.AttentionWeights.from_pretrained(tmp_path, dtype="bfloat16")
    assert_same(converted, make_weights(config).astype("bfloat16"))


# Biases, statistics.


def test_biases_against_the_config_are_ignored_with_a_warning():
    with_bias, without = make_config(attention_bias=True), make_config()
    tensors = make_weights(with_bias, layer=2).to_dict(with_bias)
    with pytest.warns(ca.IgnoredWarning, match="layer 2 holds biases of q_proj, k_proj, v_proj, o_proj"):
        weights = ca.AttentionWeights.from_dict(tensors, without, layer=2)
    assert weights.qkv_bias is None
    assert weights.o_bias is None


def test_missing_biases_are_refused():
    config = make_config(attention_bias=True)
    tensors = make_weights(config).to_dict(config)
    del tensors["model.layers.0.self_attn.v_proj.bias"]
    with pytest.raises(ca.WeightsError, match=r"self_attn\.v_proj\.bias is missing"):
        ca.AttentionWeights.from_dict(tensors, config)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_statistics(dtype):
    config = make_config(head_dim=4)
    tensors = make_weights(config).to_dict(config, prefix="")
    tensors["self_attn.k_norm.weight"] = np.array([-96.5, 2.0, 0.5, 4.0], DTYPES[dtype])
    stats = ca.AttentionWeights.from_dict(tensors, config).k_norm_stats
    assert stats.max_abs == 96.5
    assert stats.mean == -22.5
    assert stats.std == pytest.approx(np.std([-96.5, 2.0, 0.5, 4.0]), rel=1e-12)
    assert stats.quartiles_abs == pytest.approx((1.625, 3.0, 27.125))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_meet_within_a_rotated_pair(dtype):
    q_norm, k_norm = (np.array(w, DTYPES[dtype]) for w in ([-3, 1, 0.5, 2], [0.5, 4, -8, 1]))
    assert largest_pair_product(q_norm, k_norm) == 24.0  # pairs (0, 2) and (1, 3): 3 x 8 and 2 x 4


@pytest.mark.parametrize("num_hidden_layers", [3, None])
def test_read_norms_reads_norms_only(tmp_path, monkeypatch, num_hidden_layers):
    config = make_config(num_hidden_layers=num_hidden_layers)
    save_model(tmp_path, config, make_tensors(config, layers=3), shards=2)
    read = []
    original = weights_module._Checkpoint.__getitem__
    monkeypatch.setattr(
        weights_module._Checkpoint, "__getitem__", lambda self, name: (read.append(name), original(self, name))[1]
    )
    found = list(read_norms(tmp_path, config))
    expected = [make_weights(config, seed=i, layer=i) for i in range(3)]
    assert [index for index, *_ in found] == [0, 1, 2]
    for (_, q_norm, k_norm), weights in zip(found, expected, strict=True):
        np.testing.assert_array_equal(q_norm, weights.q_norm)
        np.testing.assert_array_equal(k_norm, weights.k_norm)
    assert {name.split(".")[-2] for name in read} == {"q_norm", "k_norm"}


def test_read_norms_of_too_few_layers(tmp_path):
    config = make_config(num_hidden_layers=4)
    save_model(tmp_path, config, make_tensors(config, layers=3))
    with pytest.raises(ca.WeightsError, match="holds layer 3"):
        list(read_norms(tmp_path, config))


# What is refused.


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"])
def test_a_missing_tensor_is_named(name):
    config = make_config()
    tensors = make_weights(config).to_dict(config)
    del tensors[f"model.layers.0.self_attn.{name}.weight"]
    with pytest.raises(ca.WeightsError, match=rf"model\.layers\.0\.self_attn\.{name}\.weight is missing"):
        ca.AttentionWeights.from_dict(tensors, config)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("self_attn.q_proj", [128, 96]), ("self_attn.k_proj", [64, 96]), ("self_attn.o_proj", [96, 128]),
     ("self_attn.k_norm", [32]), ("input_layernorm", [96])],
)  # fmt: skip
def test_a_misshapen_tensor_is_named_with_both_shapes(name, shape):
    config = make_config()
    tensors = make_weights(config).to_dict(config)
    tensors[f"model.layers.0.{name}.weight"] = np.ones([n + 1 for n in shape], np.float32)
    with pytest.raises(ca.WeightsError) as caught:
        ca.AttentionWeights.from_dict(tensors, config)
    got = [n + 1 for n in shape]
    assert f"model.layers.0.{name}.weight has shape {got}, the config says {shape}" in str(caught.value)


def test_a_transposed_projection_is_refused():
    config = make_config()
    tensors = make_weights(config).to_dict(config)
    tensors["model.layers.0.self_attn.q_proj.weight"] = tensors["model.layers.0.self_attn.q_proj.weight"].T
    with pytest.raises(ca.WeightsError, match=r"has shape \[96, 128\], the config says \[128, 96\]"):
        ca.AttentionWeights.from_dict(tensors, config)


@pytest.mark.parametrize("dtype", [np.float64, np.int8])
def test_a_wrong_dtype_is_named(dtype):
    config = make_config()
    tensors = make_weights(config).to_dict(config)
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(32, dtype)
    with pytest.raises(ca.WeightsError, match=f"q_norm.weight has dtype {np.dtype(dtype)}; convert it to one of"):
        ca.AttentionWeights.from_dict(tensors, config)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["input_layernorm", "self_attn.q_norm", "self_attn.k_norm"])
def test_a_norm_that_is_not_finite_is_refused(name, value):
    config = make_config()
    tensors = make_weights(config).to_dict(config)
    tensors[f"model.layers.0.{name}.weight"][1] = value
    with pytest.raises(ca.WeightsError, match=rf"layers\.0\.{name}\.weight holds NaN or Inf"):
        ca.AttentionWeights.from_dict(tensors, config)


def test_weights_of_another_config_are_refused_by_the_layer():
    config = make_config()
    weights = make_weights(config)
    with pytest.raises(ca.WeightsError, match=r"layer 0 qkv_proj has shape \[256, 96\], the config says \[192, 96\]"):
        ca.Attention(make_config(num_key_value_heads=1), weights, "float32", "cpu")
    with pytest.raises(ca.WeightsError, match="attention_bias is True and the weights hold"):
        ca.Attention(make_config(attention_bias=True), weights, "float32", "cpu")


def test_a_layer_out_of_range_is_refused(tmp_path):
    config = make_config(num_hidden_layers=2)
    save_model(tmp_path, config, make_tensors(config))
    with pytest.raises(ca.ConfigError, match="layer 2 is out of range; the model has layers 0 to 1"):
        ca.AttentionWeights.from_pretrained(tmp_path, 2)
    with pytest.raises(ca.ConfigError, match="layer is -1"):
        ca.AttentionWeights.from_pretrained(tmp_path, -1)
    wider = make_config(num_hidden_layers=None)
    with pytest.raises(ca.WeightsError, match=r"model\.layers\.2\.self_attn\.q_proj\.weight is missing.*holds layer 2"):
        ca.AttentionWeights.from_pretrained(tmp_path, 2, config=wider)


def test_a_folder_without_weights(tmp_path):
    config = make_config()
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    with pytest.raises(ca.FileError, match=f"holds neither {SINGLE_NAME} nor {INDEX_NAME}"):
        ca.AttentionWeights.from_pretrained(tmp_path)
    with pytest.raises(ca.FileError, match="nowhere does not exist; name a model folder"):
        ca.AttentionWeights.from_pretrained(tmp_path / "nowhere", config=config)


def test_a_checkpoint_without_attention(tmp_path):
    config = make_config()
    save_model(tmp_path, config, {"model.embed_tokens.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(ca.WeightsError, match=r"q_proj\.weight is missing among 1 tensors; check that .* is a Qwen3"):
        ca.AttentionWeights.from_pretrained(tmp_path)


def edit_index(folder, change) -> None:
    file = folder / INDEX_NAME
    index = json.loads(file.read_text(encoding="utf-8"))
    change(index)
    file.write_text(json.dumps(index), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: index["weight_map"].update(extra="model-9.safetensors"), "model-9.safetensors does not exist"),
        (lambda index: index["weight_map"].update({"lost.weight": "model-00001-of-00002.safetensors"}),
         "places lost.weight in model-00001-of-00002.safetensors, which does not hold it"),
        (lambda index: index["weight_map"].update(extra="../model.safetensors"), "is not a plain file name"),
        (lambda index: index["weight_map"].update(extra="/etc/model.safetensors"), "is not a plain file name"),
        (lambda index: index["weight_map"].update(extra=".."), "not a"),
        (lambda index: index["weight_map"].update(extra=3), "is not a safetensors index"),
        (lambda index: index.update(weight_map=[]), "is not a safetensors index"),
        (lambda index: index.pop("weight_map"), "is not a safetensors index"),
    ],
)  # fmt: skip
def test_a_bad_index_is_refused(tmp_path, change, words):
    config = make_config()
    save_model(tmp_path, config, make_tensors(config), shards=2)
    edit_index(tmp_path, change)
    with pytest.raises(ca.FileError, match=words):
        ca.AttentionWeights.from_pretrained(tmp_path)


@pytest.mark.parametrize("data", [b"{", b"[]", b"\xff\xfe"])
def test_an_index_that_is_no_json_object_is_refused(tmp_path, data):
    config = make_config()
    save_model(tmp_path, config, make_tensors(config), shards=2)
    (tmp_path / INDEX_NAME).write_bytes(data)
    with pytest.raises(ca.FileError, match=f"{INDEX_NAME} is not a safetensors index"):
        ca.AttentionWeights.from_pretrained(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1, -1000])
def test_a_truncated_file_is_refused(tmp_path, keep):
    config = make_config()
    save_model(tmp_path, config, make_tensors(config))
    file = tmp_path / SINGLE_NAME
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ca.FileError, match=f"{SINGLE_NAME} is not a readable safetensors file.*download it again"):
        ca.AttentionWeights.from_pretrained(tmp_path)


def rewrite_header(file, change) -> None:
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def lie_about_shape(header):
    header["model.layers.0.self_attn.q_proj.weight"]["shape"] = [1 << 20, 96]


def lie_about_offsets(header):
    header["model.layers.0.self_attn.q_proj.weight"]["data_offsets"][1] += 1 << 30


def lie_about_dtype(header):
    header["model.layers.0.self_attn.q_proj.weight"]["dtype"] = "F99"


@pytest.mark.parametrize("lie", [lie_about_shape, lie_about_offsets, lie_about_dtype])
def test_a_lying_header_is_refused(tmp_path, lie):
    config = make_config()
    save_model(tmp_path, config, make_tensors(config))
    rewrite_header(tmp_path / SINGLE_NAME, lie)
    with pytest.raises(ca.FileError, match="is not a readable safetensors file"):
        ca.AttentionWeights.from_pretrained(tmp_path)


@pytest.mark.parametrize("size", [1 << 62, 1 << 20])
def test_a_header_longer_than_the_file_is_refused(tmp_path, size):
    config = make_config()
    save_model(tmp_path, config, make_tensors(config))
    (tmp_path / SINGLE_NAME).write_bytes(struct.pack("<Q", size) + b"{}")
    with pytest.raises(ca.FileError, match="is not a readable safetensors file"):
        ca.AttentionWeights.from_pretrained(tmp_path)


def test_something_that_is_no_array_is_refused():
    config = make_config()
    tensors = make_weights(config).to_dict(config)
    tensors["model.layers.0.self_attn.q_norm.weight"] = [1.0] * 32
    with pytest.raises(ca.InputError, match=r"q_norm\.weight is a list; pass a NumPy or CuPy array"):
        ca.AttentionWeights.from_dict(tensors, config)


@pytest.mark.parametrize(
    ("rule", "q", "k", "rms"),
    [
        (takes_precise_path, 0.1, 20.0, 0.0), (multiplies_rest, 0.1, 10.0, 0.0),
        (takes_precise_path, 2.5, 3.2, 0.0), (multiplies_rest, 2.5, 1.0, 0.0),
        (takes_precise_path, 1.0, 2.5, 2.5), (multiplies_rest, 1.0, 1.25, 1.25),
    ],
)  # fmt: skip
def test_which_norm_weights_ask_for_more_than_float16(rule, q, k, rms):
    """Each rule alone: the largest weight of k, the largest product within a rotated pair, and that of the rms."""
    config = make_config(head_dim=64)
    q_norm, k_norm = np.full(64, rms and 1.0), np.full(64, rms)
    q_norm[3], k_norm[35] = q, k
    for beyond in (0.99, 1.01):
        assert rule(config, q_norm, k_norm * beyond) is (beyond > 1)
