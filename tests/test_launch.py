"""Launch arithmetic without a GPU: the struct both sides share, tiles that fit every GPU, angles from integers."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

import numpy as np
import pytest
from conftest import make_config

import cupy_attn as ca
from cupy_attn import cuda, kernels, launch, launch_decode, operands, wgmma
from cupy_attn.bench import MODELS, model_config

GPUS = {  # multiprocessors, shared memory of a block and of a multiprocessor: CUDA C++ Programming Guide
    "sm_80": launch.Limits(108, 166912, 167936),
    "sm_86": launch.Limits(84, 101376, 102400),
    "sm_90": cuda.H200,
    "sm_120": launch.Limits(170, 101376, 102400),
}
CONFIGS = {name: model_config(name) for name in MODELS} | {
    f"G {group}, D {dim}": make_config(hidden_size=136, num_attention_heads=group, num_key_value_heads=1, head_dim=dim)
    for group, dim in itertools.product((1, 5, 20), (16, 64, 80, 96, 128, 192, 256))
}


def test_the_struct_of_a_call_is_the_same_on_both_sides(tmp_path, monkeypatch):
    pytest.importorskip("cupy")
    asserts = [f"static_assert({what} == {size});" for what, size in (
        ("sizeof(Call)", launch.CALL.itemsize), ("sizeof(Note)", 4 * cuda.NOTE_WORDS), ("notes::BYTES", wgmma.NOTES)
    )]  # fmt: skip
    struct = re.search(r"struct Call \{(.*?)\n\};", (kernels.SOURCES / "call.cuh").read_text(), re.DOTALL)[1]
    code = re.sub(r"//.*", "", struct)
    assert tuple(re.findall(r"(\w+)(?=[,;])", code)) == launch.CALL.names  # fields of one size each: order is all
    for header in kernels.SOURCES.glob("*.cuh"):
        (tmp_path / header.name).write_bytes(header.read_bytes())
    (tmp_path / "same.cu").write_text(
        '#include "row_notes.cuh"\n' + "\n".join(asserts) + '\nextern "C" __global__ void same(const Call call) {}\n'
    )
    monkeypatch.setattr(kernels, "SOURCES", tmp_path)
    macros = (("HEAD_DIM", "128"), ("PARTS", "1"), ("STORAGE", "__half"))
    assert kernels.compile_for("sm_90a", "same", macros).cubin


def test_who_leaves_it_to_another_kernel_to_add_up_heads():
    """Many queries of a KV head, and many blocks to a head: 132 for 4 KV heads of each sequence, or 8."""
    shape = launch.Shape("float16", 128, precise=False, windowed=False, float32_angles=False)

    def leaves(model, batch, seq, shape=shape, limits=cuda.H200) -> bool:
        names = [one.name for one in wgmma.decode(CONFIGS[model], shape, limits, batch, seq)]
        assert names.count("attend_decode") == 1
        return names[names.index("attend_decode") + 1] == "decode_combine"

    assert [leaves("235B-A22B", batch, 1) for batch in (1, 3, 4, 8, 64)] == [True, True, False, False, False]
    assert [leaves("0.6B", 1, seq) for seq in (1, 4, 5, 8, 9)] == [False, False, True, True, False]
    assert not leaves("235B-A22B", 1, 1, dataclasses.replace(shape, batch_invariant=True))
    assert not leaves("235B-A22B", 1, 1, limits=dataclasses.replace(cuda.H200, wgmma=False))


def test_what_blocks_know_ahead_of_lengths_that_are_alike():
    config = CONFIGS["0.6B"]
    shape = launch.Shape("float16", 128, precise=False, windowed=False, float32_angles=False)
    attend = launch_decode.attend_decode(config, shape, cuda.H200, 1, alone=False)
    assert launch_decode.alike_runs(config, 1, 1, attend) == (132 // 8, 8)  # runs of a head; tiles, one for each warp
    assert launch_decode.alike_runs(config, 8, 1, attend) == (2, 8)
    assert launch_decode.alike_runs(config, 16, 1, attend) == (1, 8)
    assert launch_decode.alike_runs(config, 17, 1, attend) == launch_decode.alike_runs(config, 1, 2, attend) == (0, 0)
    invariant = launch_decode.attend_decode(
        config, dataclasses.replace(shape, batch_invariant=True), cuda.H200, 1, alone=False
    )
    assert launch_decode.alike_runs(config, 1, 1, invariant) == (0, 0)
    many = CONFIGS["G 20, D 128"]  # two heads' worth of queries to a KV head
    assert launch_decode.alike_runs(
        many, 1, 1, launch_decode.attend_decode(many, shape, cuda.H200, 1, alone=False)
    ) == (0, 0)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", CONFIGS)
def test_decode_fits_every_gpu(name, gpu):
    config = CONFIGS[name]
    for precise, float32_angles, alone, seq in itertools.product(
        (False, True), (False, True), (False, True), (1, 3, 64)
    ):
        for half_turns in {False, not precise}:
            shape = launch.Shape("float16", config.head_dim, precise, windowed=False, float32_angles=float32_angles,
                                 half_turns=half_turns)  # fmt: skip
            one = launch_decode.attend_decode(config, shape, GPUS[gpu], seq, alone=alone)
            assert one.smem_bytes + launch.STATIC_SMEM <= GPUS[gpu].block_smem
            assert one.grid == GPUS[gpu].num_sms


@pytest.mark.parametrize(
    ("precise", "float32_angles", "alone", "half_turns"),
    [(False, False, False, False), (False, False, True, False), (False, False, True, True), (True, False, True, False),
     (True, True, False, False)],
)  # fmt: skip
@pytest.mark.parametrize("name", ["0.6B", "G 20, D 256", "G 1, D 80", "G 5, D 192"])
def test_shared_memory_of_decode_is_what_the_kernel_takes(
    tmp_path, monkeypatch, name, precise, float32_angles, alone, half_turns
):
    pytest.importorskip("cupy")
    shape = launch.Shape("float16", CONFIGS[name].head_dim, precise, windowed=False, float32_angles=float32_angles,
                         half_turns=half_turns)  # fmt: skip
    one = launch_decode.attend_decode(CONFIGS[name], shape, cuda.H200, 1, alone=alone)
    for file in kernels.SOURCES.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with open(tmp_path / "attend_decode.cu", "a") as file:
        file.write(f'static_assert(sizeof(Shared) == {one.smem_bytes}, "launch_decode.py counts otherwise");\n')
    monkeypatch.setattr(kernels, "SOURCES", tmp_path)
    assert kernels.compile_for("sm_90a", "attend_decode", one.macros).cubin


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", CONFIGS)
def test_launches_that_fit_the_gpu(name, gpu):
    config, limits = CONFIGS[name], GPUS[gpu]
    for dtype, precise, fold, batch, seq in itertools.product(
        ("float16", "bfloat16"), (False, True), (False, True), (1, 8, 64, 300), (1, 2, 600)
    ):
        shape = launch.Shape(dtype, config.head_dim, precise, windowed=False, float32_angles=False)
        shape = dataclasses.replace(shape, folded=fold and wgmma.can_fold(config, shape, limits))
        calls = [wgmma.prefill(config, shape, limits, batch, seq, past_tiles=3, collect=False)]
        if launch_decode.decodes(config, shape, batch, seq):
            calls.append(wgmma.decode(config, shape, limits, batch, seq))
        for launches in calls:
            names = [one.name for one in launches]
            assert len(names) == 3 + (names[0] == "normalise_rows") + ("decode_combine" in names)
            for one in launches:
                static = (
                    launch_decode.GEMV_STATIC_SMEM if one.name.startswith(("decode_project", "decode_output")) else 0
                )
                assert one.smem_bytes + static <= limits.block_smem, one
                assert 1 <= one.grid < 2**31
                assert one.threads % 32 == 0
                assert one.splits == 1 or one.grid % one.splits == 0
                if one.name.endswith("_wgmma"):  # one block a multiprocessor, which takes all it has to do
                    assert one.grid <= limits.num_sms
                    assert one.smem_bytes + wgmma.ALIGNMENT <= limits.block_smem


def test_who_takes_hoppers_own_kernels(monkeypatch):
    config, old = make_config(head_dim=128, hidden_size=320), dataclasses.replace(cuda.H200, wgmma=False)

    def names(
        limits=cuda.H200, seq=300, windowed=False, collect=False, head_dim=128, hidden_size=320, batch_invariant=False,
        folded=False,
    ) -> list[str]:  # fmt: skip
        shape = launch.Shape("float16", head_dim, precise=False, windowed=windowed, float32_angles=False,
                             batch_invariant=batch_invariant, folded=folded)  # fmt: skip
        other = dataclasses.replace(config, head_dim=head_dim, hidden_size=hidden_size)
        return [one.name for one in wgmma.prefill(other, shape, limits, 1, seq, past_tiles=0, collect=collect)]

    portable = ["project_qkv", "attend_prefill", "project_output"]
    hopper = ["normalise_rows", "project_qkv_wgmma", "attend_wgmma", "project_output_wgmma"]
    few = "project_output_few_wgmma"
    assert names(seq=400) == hopper
    assert names() == hopper
    assert names(seq=200) == [*hopper[:3], few]  # 2 tiles of rows and 5 of columns would leave most of the GPU idle
    assert names(seq=100) == [*hopper[:2], portable[1], few]
    assert names(seq=200, limits=dataclasses.replace(cuda.H200, num_sms=18)) == hopper
    assert names(seq=200, batch_invariant=True) == hopper
    assert names(seq=400, folded=True) == hopper[1:]  # rows are not normalised ahead
    assert names(seq=8, folded=True) == names(collect=True, folded=True) == portable
    assert names(seq=400, windowed=True) == hopper
    assert names(hidden_size=264) == [portable[0], hopper[2], portable[2]]
    assert names(hidden_size=40_000) == [portable[0], hopper[2], portable[2]]  # rows are normalised in shared memory
    for given in ({"limits": old}, {"seq": 8}, {"collect": True}, {"head_dim": 64}):
        assert names(**given) == portable
    for value, wanted in (("1", False), ("0", True), ("", True)):
        monkeypatch.setenv(wgmma.PORTABLE_VARIABLE, value)
        assert wgmma.is_wanted() is wanted


@pytest.mark.parametrize(
    ("name", "seq", "keys", "k"),
    [("0.6B", 128, True, False), ("0.6B", 257, True, True), ("0.6B", 512, True, True), ("0.6B", 513, True, False),
     ("0.6B", 1056, False, False), ("8B", 512, True, False), ("8B", 513, False, False)],
)  # fmt: skip
def test_who_shares_tiles(name, seq, keys, k):
    """Keys of attention, where every tile has a multiprocessor; k of the output, where half of them would have none."""

    def shares(**changes) -> tuple[bool, bool]:
        shape = launch.Shape("float16", 128, precise=False, windowed=False, float32_angles=False)
        shape = dataclasses.replace(shape, **changes)
        *_, attend, output = wgmma.prefill(CONFIGS[name], shape, cuda.H200, 1, seq, past_tiles=0, collect=False)
        assert output.cluster == 1 or output.grid % output.cluster == 0
        return "SPLIT_KEYS" in dict(attend.macros), "SPLITS" in dict(output.macros)

    assert shares() == (keys, k)
    assert shares(batch_invariant=True) == (False, False)  # other prompts may not change the order of sums
    assert shares(precise=True) == (False, k)


@pytest.mark.parametrize(
    ("name", "batch", "seq", "past", "together"),
    [("0.6B", 1, 2048, 0, 8), ("0.6B", 1, 8192, 0, 4), ("0.6B", 1, 16384, 0, 2), ("0.6B", 1, 32768, 0, 1),
     ("0.6B", 1, 4096, 28672, 8), ("8B", 1, 4096, 28672, 4), ("8B", 1, 8192, 0, 4), ("0.6B", 8, 2048, 0, 16),
     ("0.6B", 1, 128, 1 << 20, 8)],
)  # fmt: skip
def test_heads_whose_keys_stay_in_l2_go_together(name, batch, seq, past, together):
    """But no fewer than have tiles for all multiprocessors, of which the longest is waited for in the end."""
    config, limits = CONFIGS[name], cuda.H200
    found = wgmma.heads_together(config, limits, batch, seq, past)
    assert found == together
    tiles = -(-seq // wgmma.BLOCK_M) * config.group * found
    assert found == batch * config.num_key_value_heads or tiles >= wgmma.LEAST_TILES * limits.num_sms


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"head_dim": 24}, "head_dim is 24, not a multiple of 16"), ({"head_dim": 272}, "head_dim is 272"),
     ({"hidden_size": 100}, "hidden_size is 100, not a multiple of 8")],
)  # fmt: skip
def test_what_no_kernel_takes_is_said(changes, says):
    assert says in launch.supported(make_config(**changes), "float16")
    assert launch.supported(make_config(), "float16") is None
    assert "float32" in launch.supported(make_config(), "float32")


def test_tokens_are_normalised_once_where_attention_has_room_beside_them():
    config, gpu = CONFIGS["0.6B"], cuda.H200
    shape = launch.Shape("float16", config.head_dim, precise=False, windowed=False, float32_angles=False)
    ones = [
        launch_decode.decode_project(config, shape, gpu, tokens)
        for tokens in range(1, launch_decode.DECODE_VECTORS + 1)
    ]
    assert [dict(one.macros)["HELD"] for one in ones] == ["1", "1", "2", "2", "0", "0", "0", "0"]
    attention = launch_decode.attend_decode(config, shape, gpu, 1, alone=False).smem_bytes + launch.STATIC_SMEM
    for one in ones:
        both = attention + one.smem_bytes + launch_decode.GEMV_STATIC_SMEM + 2 * launch.RESERVED_SMEM
        assert both <= gpu.sm_smem


@pytest.mark.parametrize(
    ("name", "project", "output"), [("0.6B", "4", "8"), ("1.7B", "0", "8"), ("4B", "0", "0"), ("8B", "0", "0")]
)
def test_weights_are_all_asked_for_at_once_where_a_block_has_few(name, project, output):
    config = CONFIGS[name]
    shape = launch.Shape("float16", config.head_dim, precise=False, windowed=False, float32_angles=False)
    first, last = (
        one(config, shape, cuda.H200, 2) for one in (launch_decode.decode_project, launch_decode.decode_output)
    )
    assert (dict(first.macros)["STEPS"], dict(last.macros)["STEPS"]) == (project, output)


@pytest.mark.parametrize(
    ("name", "project", "output"),
    [("0.6B", None, None), ("1.7B", (4, 16), None), ("4B", (5, 24), (8, 20)), ("8B", (8, 24), (8, 16)),
     ("32B", (10, 40), (16, 20)), ("235B-A22B", (8, 36), (16, 16))],
)  # fmt: skip
def test_other_weights_are_read_as_lines_for_one_token(name, project, output):
    """Steps of half a row, and rows of a block: those of the busiest multiprocessor are as few as can be."""
    config, gpu = CONFIGS[name], cuda.H200
    shape = launch.Shape("float16", config.head_dim, precise=False, windowed=False, float32_angles=False)
    first, last = (one(config, shape, gpu, 1) for one in (launch_decode.decode_project, launch_decode.decode_output))
    sizes = (config.q_size + 2 * config.kv_size, config.hidden_size), (config.hidden_size, config.q_size)
    for one, (rows, k_size), expected in zip((first, last), sizes, (project, output), strict=True):
        macros = dict(one.macros)
        assert ("UNIT" in macros, "TILES" in macros) == (expected is not None, expected is None)
        if expected is not None:
            of_block = math.ceil(rows / (one.grid - 1) / 4) * 4  # gemv_lines.cuh
            assert (int(macros["UNIT"]), of_block) == expected
            assert k_size == 2 * launch_decode.LINE * int(macros["UNIT"])
            assert of_block <= launch_decode.MOST_LINES
    assert launch_decode.reads_lines(config, gpu) == (name != "0.6B")
    if config.group <= 8:  # attend_decode has registers for a block of decode_output beside it, which has 48 KB at most
        attention = launch_decode.attend_decode(config, shape, gpu, 1, alone=False).smem_bytes + launch.STATIC_SMEM
        assert attention + (48 << 10) + 2 * launch.RESERVED_SMEM <= gpu.sm_smem


@pytest.mark.parametrize(("name", "tiles"), [("0.6B", 4), ("8B", 3), ("32B", 5), ("235B-A22B", 5)])
def test_blocks_of_a_few_tokens_projection_begin_all_at_once(name, tiles):
    config, gpu = CONFIGS[name], cuda.H200
    shape = launch.Shape("float16", config.head_dim, precise=False, windowed=False, float32_angles=False)
    for tokens in (1, 2, launch_decode.DECODE_VECTORS):
        one = launch_decode.decode_project(config, shape, gpu, tokens)
        assert tokens == 1 or dict(one.macros)["TILES"] == str(tiles)
        assert one.grid - 1 <= 2 * gpu.num_sms


@pytest.mark.parametrize(
    ("name", "tokens", "groups", "blocks"),
    [("0.6B", 16, 2, 128), ("0.6B", 32, 2, 256), ("0.6B", 64, 4, 256), ("8B", 64, 8, 256)],
)
def test_tokens_are_shared_out_while_each_multiprocessor_has_room_for_a_second_block(name, tokens, groups, blocks):
    config = CONFIGS[name]
    shape = launch.Shape("float16", config.head_dim, precise=False, windowed=False, float32_angles=False)
    one = launch.project_output_few(config, shape, cuda.H200, tokens)
    assert (dict(one.macros)["GROUPS"], one.grid) == (str(groups), blocks)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("hidden_size", [1024, 4096, 8192, 12_288, 16_384, 40_000])
def test_a_projection_of_few_tokens_fits_or_is_left_to_others(hidden_size, gpu):
    config = make_config(hidden_size=hidden_size)
    shape = launch.Shape("float16", config.head_dim, precise=False, windowed=False, float32_angles=False)
    kinds = []
    for tokens in range(1, launch_decode.DECODE_VECTORS + 1):
        one = launch_decode.decode_project(config, shape, GPUS[gpu], tokens)
        assert one is None or one.smem_bytes + launch_decode.GEMV_STATIC_SMEM <= GPUS[gpu].block_smem
        kinds.append(2 if one is None else dict(one.macros)["HELD"] == "0")
    assert kinds == sorted(kinds)  # once, then by every warp, then not at all: what takes less comes later


@pytest.mark.parametrize("tokens", [1, 16, 64, 65, 128])
@pytest.mark.parametrize("name", CONFIGS)
def test_clusters_of_a_few_tokens_projections_run_all_at_once(name, tokens):
    """The 132 multiprocessors of an H200 hold 30 clusters of 4 blocks that fill theirs, and 66 of 2."""
    config, gpu = CONFIGS[name], cuda.H200
    shape = launch.Shape("float16", config.head_dim, precise=False, windowed=False, float32_angles=False)
    launches = wgmma.decode(config, shape, gpu, tokens, 1)
    if not wgmma.projects_few(config, shape, gpu, tokens):
        assert not any(one.splits > 1 for one in launches)
        return
    rows, first, *_, last = launches
    assert (rows.name, rows.grid) == ("normalise_rows", tokens)
    sizes = (config.q_size + 2 * config.kv_size, config.hidden_size), (config.hidden_size, config.q_size)
    for one, (weights, k_size) in zip((first, last), sizes, strict=True):
        (_, x_rows), (_, columns) = one.boxes
        assert one.grid // one.splits * columns >= weights
        assert one.grid // one.splits <= {1: 132, 2: 66, 4: 30}[one.splits]
        assert tokens <= x_rows < tokens + 8
        x_tile, w_tile = x_rows * wgmma.GEMM_BLOCK_K * 2, columns * wgmma.GEMM_BLOCK_K * 2
        x_stages = min(wgmma.X_BYTES // x_tile, wgmma.MOST_X_STAGES, 2 * -(-k_size // wgmma.GEMM_BLOCK_K // one.splits))
        assert (one.smem_bytes - x_stages * x_tile) // w_tile >= 2 or k_size <= 64 * one.splits
        token_rows = wgmma.FEW_TOKENS * int(dict(one.macros)["TOKEN_TILES"])
        assert one.smem_bytes >= (x_stages - 1) * x_tile + token_rows * wgmma.GEMM_BLOCK_K * 2
        assert one.smem_bytes >= columns * 4 * min(token_rows, 16 * 2 ** (-(-tokens // 16) - 1).bit_length())
        beside = one.smem_bytes + rows.smem_bytes + 2 * (wgmma.ALIGNMENT + launch.RESERVED_SMEM)
        assert beside <= gpu.sm_smem


def test_who_takes_hoppers_own_kernels_for_a_few_tokens():
    def takes(tokens, *, limits=cuda.H200, **changes) -> bool:
        usual = {"precise": False, "windowed": False, "float32_angles": False}
        shape = launch.Shape("float16", 128, **usual | changes)
        return wgmma.projects_few(config, shape, limits, tokens)

    config = model_config("0.6B")
    assert [takes(tokens) for tokens in (1, 8, 9, 256, 257)] == [False, False, True, True, False]
    assert takes(9, precise=True)
    assert all(takes(tokens, batch_invariant=True) for tokens in (1, 257))
    assert not takes(9, limits=dataclasses.replace(cuda.H200, wgmma=False))
    config = model_config("8B")  # so many weights that a kernel more does not matter
    assert [takes(tokens) for tokens in (1, 2, 8)] == [False, True, True]
    assert not takes(2, precise=True)
    config = dataclasses.replace(config, hidden_size=4352)  # whose rows are not read as lines
    assert takes(1)
    config = make_config(head_dim=128, hidden_size=264)
    assert not takes(9)


@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_k_is_cut_the_same_way_in_any_batch_if_that_is_asked_for(name, precise):
    config = CONFIGS[name]
    shape = launch.Shape("float16", config.head_dim, precise, windowed=False, float32_angles=False,
                         batch_invariant=True)  # fmt: skip
    calls = [wgmma.decode(config, shape, cuda.H200, tokens, 1) for tokens in (1, 9, 64, 65, 128, 200, 500)]
    assert len({tuple(one.splits for one in launches) for launches in calls}) == 1


def test_a_row_too_long_for_shared_memory_takes_the_products_of_prefill():
    config = make_config(head_dim=64, hidden_size=40_000)
    shape = launch.Shape("float16", 64, precise=False, windowed=False, float32_angles=False)
    names = [one.name for one in launch_decode.decode(config, shape, cuda.H200, 12, 1)]
    assert names == ["project_qkv", "attend_decode", "project_output"]
    assert launch.holds_a_row(make_config(), cuda.H200)
    assert not launch.holds_a_row(config, cuda.H200)


def rotated(config, key, position):
    cos, sin = ca.rope_angles(config, np.array([position]))
    return np.asarray(ca.apply_rope(key[None, None, None], cos, sin)).reshape(config.head_dim)


@pytest.mark.parametrize("head_dim", [48, 64, 128])
def test_turns_of_keys_rotate_and_scale_them(head_dim):
    config, rng = make_config(head_dim=head_dim, rope_theta=1e4), np.random.default_rng(0)
    k_norm, key, half = rng.standard_normal(head_dim).astype(np.float32), rng.standard_normal(head_dim), head_dim // 2
    turns = operands.key_turns(config, k_norm).astype(np.float64)
    apart = operands.turns_apart(config, k_norm).astype(np.float64)
    keys = launch_decode.DECODE_TOGETHER * launch_decode.DECODE_TILE
    assert turns.shape == (launch_decode.DECODE_TILE, half, 4)
    assert apart.shape == (1 + keys, launch_decode.turn_stride(half), 4)
    low, high = np.split(key, 2)
    for offset in range(keys):
        expected = rotated(config, key * k_norm, offset)
        of_pair = apart[1 + offset, : half // 2].reshape(half, 2)
        weights = apart[0, : half // 2].reshape(-1, 2, 2)
        a, c = low * weights[:, 0].ravel(), high * weights[:, 1].ravel()
        turned = np.r_[a * of_pair[:, 0] - c * of_pair[:, 1], c * of_pair[:, 0] + a * of_pair[:, 1]]
        assert np.abs(turned - expected).max() < 1e-5
        if offset < launch_decode.DECODE_TILE:
            of_pair = turns[offset, np.arange(half) ^ (offset & 1)]  # as the kernel finds them
            turned = np.r_[low * of_pair[:, 0] - high * of_pair[:, 1], high * of_pair[:, 2] + low * of_pair[:, 3]]
            assert np.abs(turned - expected).max() < 1e-5


@pytest.mark.parametrize("head_dim", [16, 48, 64, 128, 256])
@pytest.mark.parametrize("theta", [1e2, 1e4, 1e6])
def test_keys_that_are_not_turned_make_scores(head_dim, theta):
    """Pairs that turn slowly as they are, the others times cosines and sines in float16."""
    config, rng = make_config(head_dim=head_dim, rope_theta=theta), np.random.default_rng(0)
    k_norm, half, keys = rng.standard_normal(head_dim).astype(np.float32), head_dim // 2, launch_decode.DECODE_TILE
    turns, second = operands.half_turns(config), operands.second_turns(config, k_norm).astype(np.float64)
    assert turns.shape == (launch_decode.DECODE_TOGETHER * keys, launch_decode.turn_row(head_dim // 16), 4)
    assert second.shape == (half // 2, 2, 4)
    fast = 8 * launch_decode.fast_blocks(config, keys)
    assert 8 <= fast <= half
    w_low, w_high = second[:, 0, :2].ravel(), second[:, 0, 2:].ravel()
    s_low, s_high = second[:, 1, :2].ravel(), second[:, 1, 2:].ravel()
    turns = turns.view(np.float16).reshape(*turns.shape[:2], 2, 2, 2).astype(np.float64)
    query, key = rng.standard_normal((2, head_dim))
    (q_low, q_high), (low, high) = np.split(query, 2), np.split(key, 2)
    pair = np.arange(half)
    first = low * (w_low * q_low) + high * (w_high * q_high)
    by_sines = low * (w_low * q_high) - high * (w_high * q_low)
    slowly = low * (s_low * q_high) + high * (s_high * q_low)
    for offset in range(keys):
        cos, sin = turns[
            offset, pair // 16 * 4 + pair % 8 // 2, pair // 8 % 2, :, pair % 2
        ].T  # as the kernel finds them
        of_slow = first + offset / operands.SINE_SCALE * slowly
        score = np.where(pair < fast, cos * first + sin * by_sines, of_slow).sum() / operands.SECOND_SCALE
        exact = query @ rotated(config, key * k_norm, offset)
        assert abs(score - exact) < 2.0**-11 * np.linalg.norm(query) * np.linalg.norm(key * k_norm)


def test_blocks_of_pairs_that_turn_slowly():
    """Of Qwen3's pairs half turn by less than a 64th of a radian from a tile's first key to its last."""
    config, tile = make_config(head_dim=128, rope_theta=1e6), launch_decode.DECODE_TILE
    assert launch_decode.fast_blocks(config, tile) == 4
    assert launch_decode.fast_blocks(config, launch_decode.DECODE_TOGETHER * tile) == 5
    assert launch_decode.fast_blocks(make_config(head_dim=128, rope_theta=1e2), tile) == 8
    assert launch_decode.fast_blocks(make_config(head_dim=64, rope_theta=1e30), tile) == 1
    scaled = make_config(head_dim=128, rope_theta=1e6, rope_scaling={"rope_type": "linear", "factor": 1e6})
    assert launch_decode.fast_blocks(scaled, tile) == 1


@pytest.mark.parametrize("head_dim", range(16, 257, 16))
def test_two_keys_next_to_each_other_meet_no_bank_twice(head_dim):
    """Reads of 16 bytes go by eight lanes at a time, which are of two keys: 128 bytes, all banks."""
    for blocks in range(1, head_dim // 16 + 1):
        stride, row = launch_decode.turn_stride(8 * blocks), launch_decode.turn_row(blocks)
        places = [[(key * stride + quad) % 8, (key * row + (quad ^ (key * 4 if row % 8 == 0 else 0))) % 8]
                  for key in range(2) for quad in range(4)]  # fmt: skip
        assert all(len(set(of_lanes)) == 8 for of_lanes in zip(*places, strict=True))
        assert stride >= 4 * blocks
        assert row >= 2 * blocks


def test_step_turns_lead_from_one_row_to_the_next():
    config = make_config(head_dim=48, rope_theta=1e4)
    cosine, sine = operands.step_turns(config).astype(np.float64).T
    cos, sin = (np.asarray(part)[..., :24] for part in ca.rope_angles(config, np.array([5, 5 + operands.STEP])))
    assert np.abs(cos[0] * cosine - sin[0] * sine - cos[1]).max() < 1e-6
    assert np.abs(sin[0] * cosine + cos[0] * sine - sin[1]).max() < 1e-6


@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_angles_from_integers_are_right_at_any_position(theta):
    """What rope.cuh does, in NumPy's integers: turns modulo one, 23 bits of them."""
    config = make_config(head_dim=128, rope_theta=theta, max_position_embeddings=1 << 21)
    frequency = operands.angle_frequencies(config, "float64")
    high, low = frequency >> np.uint64(32), frequency & np.uint64(0xFFFFFFFF)
    positions = np.unique(np.r_[np.arange(300), np.geomspace(300, 2_000_000, 500).astype(np.int64)])
    p = positions.astype(np.uint64)[:, None]
    turn = (p * high + ((p * low + (np.uint64(256) << np.uint64(32))) >> np.uint64(32))) & np.uint64(0xFFFFFFFF)
    angle = (turn >> np.uint64(9)).astype(np.float64) / 2**23 * 2 * np.pi
    cos, sin = ca.rope_angles(config, positions)
    assert np.abs(np.cos(angle) - cos).max() < 5e-7
    assert np.abs(np.sin(angle) - sin).max() < 5e-7


@pytest.mark.parametrize(("heads", "hidden"), [((3, 1), 1024), ((9, 3), 576), ((2, 1), 192), ((16, 8), 1024)])
def test_every_kernel_that_a_prompt_may_take_is_listed(monkeypatch, heads, hidden):
    monkeypatch.setattr(cuda, "problem", lambda: "none")
    config = make_config(num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=128, hidden_size=hidden)
    listed = cuda.specialisations(config, np.dtype("float16"), precise=False)
    for rows, folded in itertools.product(range(1, 70_000, 61), (False, True)):
        shape = launch.Shape("float16", 128, False, windowed=False, float32_angles=False, folded=folded)
        for one in wgmma.prefill(config, shape, cuda.H200, 1, rows, past_tiles=0, collect=False):
            assert (one.name, one.macros) in listed, (rows, one)
