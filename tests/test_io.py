"""Files: what goes in comes out bit for bit, what is damaged is refused in one sentence."""

from __future__ import annotations

import pickle
import zipfile

import numpy as np
import pytest
from conftest import make_config, make_hidden, make_weights
from file_helpers import CONFIG, SUFFIXES, npy_bytes, refused, safetensors_bytes, sample, write

import cupy_attn as ca
from cupy_attn import io
from cupy_attn.arrays import BFLOAT16, STORAGE_DTYPES

# Round trips.


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_arrays_round_trip_bit_for_bit(tmp_path, suffix, dtype):
    given = {"y": sample(dtype)} if suffix == ".npy" else {"y": sample(dtype), "k": sample(dtype, (2, 3, 4))}
    path = tmp_path / f"out{suffix}"
    io.save_arrays(path, given, {"made_by": "a test"})
    arrays, metadata = io.load_arrays(path)
    assert set(arrays) == ({"hidden_states"} if suffix == ".npy" else {"y", "k"})
    kept = "float32" if dtype == "bfloat16" and suffix != ".safetensors" else dtype
    for name, array in arrays.items():
        assert array.dtype == STORAGE_DTYPES[kept]
        assert array.astype(STORAGE_DTYPES[dtype]).tobytes() == given["y" if suffix == ".npy" else name].tobytes()
    assert metadata == ({"made_by": "a test"} if suffix == ".safetensors" else {})


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_bfloat16_that_numpy_wrote_as_void_is_read_as_bfloat16(tmp_path, suffix):
    given = sample("bfloat16")
    array = next(iter(io.load_arrays(write(tmp_path, suffix, x=given))[0].values()))
    assert array.dtype == BFLOAT16
    assert array.tobytes() == given.tobytes()


def test_views_are_written_as_what_they_show(tmp_path):
    base = sample(shape=(8, 6, 4))
    for view in (base.T, base[::2], base[:, ::-1], np.asfortranarray(base)):
        for suffix in SUFFIXES:
            io.save_arrays(tmp_path / f"view{suffix}", {"x": view})
            read = next(iter(io.load_arrays(tmp_path / f"view{suffix}")[0].values()))
            assert np.array_equal(read, view)


def test_an_array_may_have_any_name_in_an_npz(tmp_path):
    given = {name: sample() for name in ("x.npy.y", "model.layers.0/q", "a b")}
    io.save_arrays(tmp_path / "out.npz", given)
    assert set(io.load_arrays(tmp_path / "out.npz")[0]) == set(given)


@pytest.mark.parametrize("compressed", [np.savez, np.savez_compressed])
def test_npz_of_either_kind_is_read(tmp_path, compressed):
    compressed(tmp_path / "x.npz", x=sample(), positions=np.arange(5))
    dump = io.load_dump(tmp_path / "x.npz")
    assert np.array_equal(dump.hidden_states[0], sample())
    assert dump.positions.tolist() == [0, 1, 2, 3, 4]


# Files that are not what they say.


class Marker:
    """Pickles to a call that makes a file: whoever unpickles it leaves a trace."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_the_marker_works(tmp_path):
    pickle.loads(pickle.dumps(Marker(tmp_path / "ran"))).close()
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("wrapped", ["object array", "bare pickle"])
def test_pickles_are_never_loaded(tmp_path, suffix, wrapped):
    marker, path = Marker(tmp_path / "ran"), tmp_path / f"evil{suffix}"
    if wrapped == "bare pickle":
        path.write_bytes(pickle.dumps(marker))
    elif suffix == ".npz":
        np.savez(path, hidden_states=np.array([marker], object), x=sample())
    else:
        with open(path, "wb") as file:
            np.save(file, np.array([marker], object))
    message = refused(ca.FileError, io.load_arrays, path)
    if wrapped == "object array" and suffix != ".safetensors":
        assert "never loaded" in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_truncation_is_refused(tmp_path, suffix):
    path = write(tmp_path, suffix, x=sample())
    whole = path.read_bytes()
    for length in sorted({0, 1, 7, 8, 9, 64, len(whole) // 2, len(whole) - 1}):
        path.write_bytes(whole[:length])
        assert str(path) in refused(ca.FileError, io.load_arrays, path)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_bytes_past_the_end_are_refused(tmp_path, suffix):
    path = write(tmp_path, suffix, x=sample())
    path.write_bytes(path.read_bytes() + bytes(32))
    refused(ca.FileError, io.load_arrays, path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damaged_bytes_raise_nothing_but_our_errors(tmp_path, suffix):
    path = write(tmp_path, suffix, x=sample())
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    rng = np.random.default_rng(0)
    survived, messages = 0, []
    for _ in range(300):
        damaged = whole.copy()
        where = rng.integers(0, min(len(whole), 160), 3) if rng.random() < 0.7 else rng.integers(0, len(whole), 3)
        damaged[where] = rng.integers(0, 256, 3)
        path.write_bytes(damaged.tobytes())
        try:
            io.load_dump(path)
            survived += 1
        except ca.CupyAttnError as error:
            messages.append(str(error))
    assert survived < 300
    assert not any("\n" in message for message in messages)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_text_file_with_another_ending_is_refused_as_what_it_is(tmp_path, suffix):
    path = tmp_path / f"notes{suffix}"
    path.write_text("these are not activations\n" * 20)
    message = refused(ca.FileError, io.load_arrays, path)
    assert "not a readable" in message
    assert "pickle" not in message


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("other", SUFFIXES)
def test_a_file_of_another_format_is_refused(tmp_path, suffix, other):
    path = tmp_path / f"renamed{suffix}"
    path.write_bytes(write(tmp_path, other, hidden_states=sample()).read_bytes())
    if suffix == other:
        assert np.array_equal(io.load_dump(path).hidden_states[0], sample())
    else:
        refused(ca.FileError, io.load_arrays, path)


@pytest.mark.parametrize("name", ["x.txt", "x", "x.pt", "x.NPY", "x.npy.gz"])
def test_unknown_endings_are_refused_for_reading_and_writing(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    assert ".npy, .npz, .safetensors" in refused(ca.FileError, io.load_arrays, tmp_path / name)
    assert ".npy, .npz, .safetensors" in refused(ca.FileError, io.save_arrays, tmp_path / name, {"x": sample()})


def test_a_missing_file_is_named(tmp_path):
    assert "missing.npy does not exist" in refused(ca.FileError, io.load_arrays, tmp_path / "missing.npy")
    (tmp_path / "folder.npy").mkdir()
    refused(ca.FileError, io.load_arrays, tmp_path / "folder.npy")


NPY_LIES = {
    "more rows than data": "(6, 8)",
    "fewer rows than data": "(4, 8)",
    "terabytes": "(1000000000000, 8)",
    "more than 64 bits": "(0, 99999999999999999999999)",
    "overflowing product": "(4611686018427387904, 4611686018427387904)",
    "negative": "(-5, 8)",
    "an expression": "(2**3,)",
    "a call": "(__import__('os').getpid(),)",
    "deep nesting": "(" * 5000,
}


@pytest.mark.parametrize("lie", NPY_LIES)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_npy_headers_that_lie_are_refused(tmp_path, suffix, lie):
    data = npy_bytes(NPY_LIES[lie], sample().tobytes())
    path = tmp_path / f"lie{suffix}"
    if suffix == ".npy":
        path.write_bytes(data)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", data)
    refused(ca.FileError, io.load_arrays, path)


def test_a_zip_of_other_things_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", npy_bytes("(5, 8)", sample().tobytes()))
        archive.writestr("readme.txt", "hello")
    refused(ca.FileError, io.load_arrays, tmp_path / "x.npz")


SAFETENSORS_LIES = {
    "offsets past the end": {"x": {"dtype": "F32", "shape": [5, 8], "data_offsets": [0, 1600]}},
    "offsets before the start": {"x": {"dtype": "F32", "shape": [5, 8], "data_offsets": [-160, 0]}},
    "offsets backwards": {"x": {"dtype": "F32", "shape": [5, 8], "data_offsets": [160, 0]}},
    "shape larger than its bytes": {"x": {"dtype": "F32", "shape": [50, 8], "data_offsets": [0, 160]}},
    "huge shape": {"x": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 160]}},
    "overlapping": {"x": {"dtype": "F32", "shape": [5, 8], "data_offsets": [0, 160]},
                    "y": {"dtype": "F32", "shape": [5, 8], "data_offsets": [0, 160]}},
    "a hole": {"x": {"dtype": "F32", "shape": [1], "data_offsets": [156, 160]}},
    "unknown dtype": {"x": {"dtype": "F99", "shape": [5, 8], "data_offsets": [0, 160]}},
    "a dtype numpy lacks": {"x": {"dtype": "F8_E8M0", "shape": [160], "data_offsets": [0, 160]}},
    "not an object": b"[1, 2, 3]",
    "not JSON": b"{'x'",
    "not UTF-8": b"\xff\xfe" * 8,
}  # fmt: skip


@pytest.mark.parametrize("lie", SAFETENSORS_LIES)
def test_safetensors_headers_that_lie_are_refused(tmp_path, lie):
    path = tmp_path / "lie.safetensors"
    path.write_bytes(safetensors_bytes(SAFETENSORS_LIES[lie], sample().tobytes()))
    refused(ca.FileError, io.load_arrays, path)


@pytest.mark.parametrize("length", [0, 2**20, 2**40, 2**63, 2**64 - 1])
def test_safetensors_header_lengths_that_lie_are_refused(tmp_path, length):
    path = tmp_path / "lie.safetensors"
    header = {"x": {"dtype": "F32", "shape": [5, 8], "data_offsets": [0, 160]}}
    path.write_bytes(safetensors_bytes(header, sample().tobytes(), length=length))
    refused(ca.FileError, io.load_arrays, path)


# Activations.


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_the_first_row_with_nan_or_inf_is_named(tmp_path, value, dtype):
    what = "NaN" if np.isnan(value) else "Inf"
    x = sample(shape=(7, 8)).astype(dtype if dtype == "float64" else STORAGE_DTYPES[dtype])
    x[4, 3] = x[6, 0] = value
    message = refused(ca.InputError, io.load_dump, write(tmp_path, ".npz", x=x))
    assert f"holds {what} first in row 4 (2 rows in all)" in message
    batched = np.stack([np.ones_like(x), x])
    message = refused(ca.InputError, io.load_dump, write(tmp_path, ".npy", x=batched))
    assert f"holds {what} first in batch 1 token 4 (2 rows in all)" in message


@pytest.mark.filterwarnings("error")
def test_large_float64_is_not_taken_for_infinity(tmp_path):
    x = np.full((2, 8), 1e300)
    assert np.array_equal(io.load_dump(write(tmp_path, ".npy", x=x)).hidden_states[0], x)


@pytest.mark.parametrize("dtype", [np.int32, np.int8, np.bool_, np.complex64, ">f4", "U3", "M8[s]"])
def test_activations_that_are_no_floats_are_refused(tmp_path, dtype):
    x = np.ones((5, 8)).astype(dtype) if dtype != "M8[s]" else np.ones((5, 8), np.int64).astype(dtype)
    message = refused(ca.InputError, io.load_dump, write(tmp_path, ".npy", x=x))
    assert f"is {x.dtype}" in message


@pytest.mark.parametrize("shape", [(), (8,), (1, 2, 3, 8)])
def test_activations_of_another_rank_are_refused(tmp_path, shape):
    message = refused(ca.InputError, io.load_dump, write(tmp_path, ".npy", x=np.ones(shape, np.float32)))
    assert f"has shape {list(shape)}" in message


@pytest.mark.parametrize("shape", [(0, 8), (5, 0), (0, 5, 8), (2, 0, 8)])
def test_empty_activations_are_refused(tmp_path, shape):
    message = refused(ca.InputError, io.load_dump, write(tmp_path, ".npz", x=np.ones(shape, np.float32)))
    assert "holds no token" in message


def test_rows_of_another_model_are_refused():
    message = refused(ca.InputError, io.check_activations, "x", sample(), 96)
    assert "rows of 8" in message
    assert "hidden_size is 96" in message


def test_the_batch_axis_is_remembered(tmp_path):
    flat = io.load_dump(write(tmp_path, ".npz", x=sample(), q=sample(shape=(5, 2, 4)), y=sample()))
    assert not flat.batched
    assert flat.hidden_states.shape == flat.stages["y"].shape == (1, 5, 8)
    assert flat.stages["q"].shape == (1, 5, 2, 4)
    batched = io.load_dump(write(tmp_path, ".npz", x=sample(shape=(2, 5, 8)), y=sample(shape=(2, 5, 8))))
    assert batched.batched
    assert batched.hidden_states.shape == batched.stages["y"].shape == (2, 5, 8)


def test_the_activations_are_found_by_name_or_alone_or_by_key(tmp_path):
    a, b = sample(), sample() * 2
    for name in io.HIDDEN_NAMES:
        assert np.array_equal(io.load_dump(write(tmp_path, ".npz", other=b, **{name: a})).hidden_states[0], a)
    assert np.array_equal(io.load_dump(write(tmp_path, ".npz", whatever=a)).hidden_states[0], a)
    two = write(tmp_path, ".safetensors", one=a, two=b)
    assert np.array_equal(io.load_dump(two, "two").hidden_states[0], b)
    assert "one, two" in refused(ca.FileError, io.load_dump, two)
    assert "none is named three" in refused(ca.FileError, io.load_dump, two, "three")
    many = write(tmp_path, ".npz", **{f"a{i}": a for i in range(11)})
    assert "and 3 more" in refused(ca.FileError, io.load_dump, many)


def test_a_file_without_arrays_is_refused(tmp_path):
    np.savez(tmp_path / "none.npz")
    assert "holds no arrays" in refused(ca.FileError, io.load_dump, tmp_path / "none.npz")


# Caches.


def make_layer(config=CONFIG, dtype="float16", layer=1) -> ca.Attention:
    return ca.Attention(config, make_weights(config, layer=layer, dtype=dtype), dtype, "cpu")


def saved_cache(folder, dtype="float16"):
    layer = make_layer(dtype=dtype)
    cache = layer.new_cache(2, 12)
    layer(make_hidden(CONFIG, 2, 6, dtype=dtype), cache, num_tokens=[6, 4])
    io.save_cache(folder / "cache.safetensors", cache)
    return layer, cache, folder / "cache.safetensors"


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_caches_round_trip_and_go_on_alike(tmp_path, dtype):
    layer, cache, path = saved_cache(tmp_path, dtype)
    read = io.load_cache(path, layer, room=3)
    assert read.lengths.tolist() == [6, 4]
    assert read.capacity == 9
    for name, array in cache.state().items():
        assert read.state()[name].tobytes() == array.tobytes()
    x = make_hidden(CONFIG, 2, 3, seed=5, dtype=dtype)
    assert layer(x, read).tobytes() == layer(x, cache).tobytes()


def test_a_cache_of_another_layer_config_or_dtype_is_refused(tmp_path):
    _, _, path = saved_cache(tmp_path)
    assert "layer 1, used with layer 2" in refused(ca.CacheError, io.load_cache, path, make_layer(layer=2), 1)
    other = make_config(rope_theta=10000.0)
    assert "rope_parameters" in refused(ca.CacheError, io.load_cache, path, make_layer(other), 1)
    other = make_config(num_key_value_heads=4)
    assert "num_key_value_heads" in refused(ca.CacheError, io.load_cache, path, make_layer(other), 1)
    assert "holds float16" in refused(ca.CacheError, io.load_cache, path, make_layer(dtype="float32"), 1)


def test_a_dump_is_no_cache(tmp_path):
    io.save_arrays(tmp_path / "dump.safetensors", {"hidden_states": sample(), "k": sample()})
    assert "is not a cache" in refused(ca.FileError, io.load_cache, tmp_path / "dump.safetensors", make_layer(), 1)
    for call, last in ((io.load_cache, (make_layer(), 1)), (io.save_cache, (make_layer().new_cache(1, 1),))):
        assert "does not end in .safetensors" in refused(ca.FileError, call, tmp_path / "cache.npz", *last)


DAMAGED_METADATA = {
    "config": ["", "{", "5", "null", "[]", '"x"', "{}", '{"hidden_size": 96}', "\x00"],
    "layer": ["", "one", "1.5", "[]"],
    "format": ["", "cupy_attn cache 2"],
}


@pytest.mark.parametrize(("key", "value"), [(key, v) for key, values in DAMAGED_METADATA.items() for v in values])
def test_damaged_cache_metadata_is_refused(tmp_path, key, value):
    layer, _, path = saved_cache(tmp_path)
    arrays, metadata = io.load_arrays(path)
    io.save_arrays(path, arrays, metadata | {key: value})
    refused(ca.FileError, io.load_cache, path, layer, 1)
    io.save_arrays(path, arrays, {name: v for name, v in metadata.items() if name != key})
    refused(ca.FileError, io.load_cache, path, layer, 1)


DAMAGED_ARRAYS = {
    "k of rank 3": lambda s: s | {"k": s["k"][0]},
    "k of integers": lambda s: s | {"k": s["k"].astype(np.int32)},
    "no sequence": lambda s: {name: a[:0] for name, a in s.items()},
    "v shorter": lambda s: s | {"v": s["v"][:, :-1]},
    "v of another dtype": lambda s: s | {"v": s["v"].astype(np.float32)},
    "lengths of one sequence": lambda s: s | {"lengths": s["lengths"][:1]},
    "lengths too long": lambda s: s | {"lengths": s["lengths"] + 1},
    "lengths negative": lambda s: s | {"lengths": s["lengths"] * 0 - 1},
    "lengths that are no integers": lambda s: s | {"lengths": s["lengths"] + 0.5 - 1},
    "positions that are NaN": lambda s: s | {"positions": s["positions"] * np.nan},
    "positions that fall": lambda s: s | {"positions": s["positions"][:, ::-1]},
    "positions past the model's": lambda s: s | {"positions": s["positions"] + CONFIG.max_position},
    "positions of another rank": lambda s: s | {"positions": s["positions"][0]},
}


@pytest.mark.parametrize("damage", DAMAGED_ARRAYS)
def test_damaged_cache_arrays_are_refused(tmp_path, damage):
    layer, _, path = saved_cache(tmp_path)
    arrays, metadata = io.load_arrays(path)
    io.save_arrays(path, DAMAGED_ARRAYS[damage](arrays), metadata)
    with pytest.raises(ca.CacheError, match=r"^[^\n]+\.$"):
        io.load_cache(path, layer, 1)


@pytest.mark.parametrize("lost", ["k", "v", "positions", "lengths"])
def test_a_cache_that_lost_an_array_is_refused(tmp_path, lost):
    layer, _, path = saved_cache(tmp_path)
    arrays, metadata = io.load_arrays(path)
    io.save_arrays(path, {name: a for name, a in arrays.items() if name != lost}, metadata)
    refused(ca.FileError, io.load_cache, path, layer, 1)
