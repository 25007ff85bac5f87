"""Patched transformers models: the same tokens and hidden states, with this package's layer in them."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

import cupy_attn as ca

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import patch_speed  # noqa: E402
from patch_speed import logit_error, logits, random_model, relative  # noqa: E402
from test_transformers import make_model, save  # noqa: E402

from cupy_attn.integrations.transformers import patch, unpatch  # noqa: E402

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5], [8, 9, 7, 9, 3, 2], [3]]
# Both compute in float32, with scores of up to a few hundred: 2e-6 each and layer.
LOGITS_BAR = 1e-4


def left_padded(prompts):
    """Return ids [B, S] and attention mask of prompts padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def generate(model, ids, mask=None, **options):
    model.generation_config.pad_token_id = 0
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, **options)


@pytest.fixture(params=["dense", "moe"])
def model(request):
    return make_model(request.param)


def test_a_patched_model_says_the_same(model):
    ids = torch.tensor([PROMPTS[0]])
    before, tokens = logits(model, ids), generate(model, ids)
    patch(model, capacity=64)
    assert relative(logits(model, ids), before) <= LOGITS_BAR
    assert torch.equal(generate(model, ids), tokens)


def test_prompts_of_unequal_lengths_each_say_what_they_say_alone(model):
    ids, mask = left_padded(PROMPTS)
    together = generate(model, ids, mask)
    patch(model, capacity=64)
    assert torch.equal(generate(model, ids, mask), together)
    for prompt, row in zip(PROMPTS, together, strict=True):
        alone = generate(model, torch.tensor([prompt]))
        assert torch.equal(alone[0, len(prompt) :], row[ids.shape[1] :])


@pytest.mark.parametrize("mask", [[1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [1, 0, 1, 0, 1]])
def test_padding_may_be_anywhere(mask):
    model, ids = make_model(), torch.tensor([[4, 8, 15, 16, 23], [4, 8, 15, 16, 23]])
    mask = torch.tensor([mask, [1] * 5])
    shown = mask.bool()
    before = logits(model, ids, mask)
    patch(model)
    assert relative(logits(model, ids, mask)[shown], before[shown]) <= LOGITS_BAR


@pytest.mark.parametrize("ready", [True, False])
def test_a_conversation_goes_on_in_one_cache(ready):
    model, ids = make_model(), torch.tensor([PROMPTS[0]])
    whole = logits(model, ids)
    patch(model, capacity=16)
    cache = transformers.DynamicCache(config=model.config if ready else None)
    parts = [logits(model, part, past_key_values=cache) for part in (ids[:, :3], ids[:, 3:4], ids[:, 4:])]
    assert relative(torch.cat(parts, 1), whole) <= LOGITS_BAR
    assert cache.get_seq_length() == 8
    assert [layer.cache.lengths.tolist() for layer in cache.layers] == [[8]] * 4
    cache.reset()
    assert relative(logits(model, ids, past_key_values=cache), whole) <= LOGITS_BAR


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_layer_takes_the_cache_by_its_old_and_its_new_name(name):
    model = make_model()
    patch(model, capacity=16)
    cache, positions = transformers.DynamicCache(config=model.config), torch.arange(3)[None]
    with torch.no_grad():
        model.model.layers[0](torch.randn(1, 3, 96), position_ids=positions, **{name: cache})
    assert cache.get_seq_length() == 3


def test_positions_are_the_models():
    model, ids = make_model(), torch.tensor([PROMPTS[0]])
    positions = torch.tensor([[0, 1, 2, 10, 11, 40, 41, 42]])
    before = logits(model, ids, position_ids=positions)
    patch(model)
    assert relative(logits(model, ids, position_ids=positions), before) <= LOGITS_BAR
    assert relative(logits(model, ids), before) > LOGITS_BAR


def test_sliding_windows_slide():
    model = make_model(use_sliding_window=True, sliding_window=4, max_window_layers=2)
    ids = torch.tensor([PROMPTS[0]])
    before, tokens = logits(model, ids), generate(model, ids)
    patch(model, capacity=64)
    assert relative(logits(model, ids), before) <= LOGITS_BAR
    assert torch.equal(generate(model, ids), tokens)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_closer_to_float32_than_the_models_own(dtype):
    ids = torch.tensor([PROMPTS[0]])
    wide = make_model(dtype=dtype).float()
    truth = logits(wide, ids)
    model = make_model(dtype=dtype)
    own = relative(logits(model, ids).float(), truth)
    patch(model)
    assert relative(logits(model, ids).float(), truth) < own


def test_unpatch_gives_the_model_back(model):
    ids = torch.tensor([PROMPTS[0]])
    before = logits(model, ids)
    hooks = len(model.model._forward_pre_hooks)
    patch(model)
    unpatch(model)
    assert torch.equal(logits(model, ids), before)
    assert len(model.model._forward_pre_hooks) == hooks
    assert all("forward" not in vars(layer) for layer in model.model.layers)
    patch(model)  # and again
    assert relative(logits(model, ids), before) <= LOGITS_BAR


def test_the_base_model_is_patched_too():
    model, ids = make_model(), torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        before = model.model(ids).last_hidden_state
        patch(model.model)
        assert relative(model.model(ids).last_hidden_state, before) <= LOGITS_BAR


# What it will not do, it says.


def test_what_cannot_be_patched_is_said():
    model = make_model()
    with pytest.raises(
        ca.InputError, match=r"model is a Linear \(it has no decoder layers\); pass a transformers Qwen3"
    ):
        patch(torch.nn.Linear(2, 2))
    with pytest.raises(ca.InputError, match="is not patched; there is nothing to undo"):
        unpatch(model)
    patch(model)
    with pytest.raises(ca.InputError, match="is patched already; unpatch it first"):
        patch(model)
    unpatch(model)
    for capacity in (0, -1, 1.5, "8", True, 257):
        with pytest.raises(ca.InputError, match=f"capacity is {capacity!r}; it must be an integer from 1 to 256, the"):
            patch(model, capacity=capacity)
    patch(model, capacity=256)
    with pytest.raises(ca.InputError, match="the model's dtype is float64; convert it to one of float16"):
        patch(make_model(dtype=torch.float64))


def test_what_a_patched_model_cannot_do_is_said():
    model, ids = make_model(), torch.tensor([PROMPTS[0]])
    used = transformers.DynamicCache(config=model.config)
    logits(model, ids, past_key_values=used)
    static = transformers.StaticCache(config=model.config, max_cache_len=32)
    patch(model, capacity=16)
    with pytest.raises(ca.CacheError, match="the cache holds 8 tokens from before the model was patched; start"):
        logits(model, ids, past_key_values=used)
    with pytest.raises(ca.CacheError, match=r"the cache holds a Static\w+; use a DynamicCache"):
        logits(model, ids, past_key_values=static)
    with pytest.raises(ca.CacheError, match=r"the cache holds a Static\w+; use a DynamicCache"):
        generate(model, ids, cache_implementation="static")
    with pytest.raises(ca.CacheError, match="past_key_values is a tuple; pass a DynamicCache, or none"):
        logits(model, ids, past_key_values=())
    with pytest.raises(ca.InputError, match="gradients are on; call a patched model under"):
        model(ids)
    with pytest.raises(ca.InputError, match=r"attention_mask is \[1, 1, 8, 8\]; a patched model takes zeros and ones"):
        logits(model, ids, torch.ones(1, 1, 8, 8))
    with pytest.raises(ca.InputError, match=r"attention_mask has shape \[1, 5\], for hidden states \[1, 8\]"):
        logits(model, ids, torch.ones(1, 5), position_ids=torch.arange(8)[None])
    with pytest.raises(ca.InputError, match="output_attentions is set; a patched model does not keep"):
        logits(model, ids, output_attentions=True)
    with pytest.raises(ca.CacheError, match="beam search, assisted generation and offloading rearrange a cache"):
        generate(model, ids, num_beams=2)
    with pytest.raises(
        ca.CacheError, match="17 tokens does not fit capacity 16; unpatch, then patch the model with capac"
    ):
        generate(model, ids)
    with pytest.raises(ca.InputError, match="the model's positions are 0 to 255"):  # no capacity would help
        logits(model, torch.zeros(1, 257, dtype=torch.long))
    cache = transformers.DynamicCache(config=model.config)
    logits(model, ids[:, :4], past_key_values=cache)
    with pytest.raises(ca.InputError, match="shows 3 earlier tokens of sequence 0, its cache holds 4; show all"):
        logits(model, ids[:, 4:5], torch.tensor([[0, 1, 1, 1, 1]]), past_key_values=cache)


def test_a_cache_of_another_batch_and_one_given_back_are_refused():
    model, ids = make_model(), torch.tensor([PROMPTS[0]] * 2)
    patch(model, capacity=32)
    cache = transformers.DynamicCache(config=model.config)
    logits(model, ids, past_key_values=cache)
    for mask in (None, torch.ones(3, 16)):
        with pytest.raises(
            ca.CacheError, match="the cache is of batch 2, the call of batch 3; start with an empty one"
        ):
            logits(model, ids[:1].repeat(3, 1), mask, past_key_values=cache)
    unpatch(model)
    with pytest.raises(ca.CacheError, match="a patched model filled this cache, which one that is not patched cannot"):
        logits(model, ids, past_key_values=cache)


def test_a_model_converted_after_it_was_patched_is_patched_again():
    model, ids = make_model(), torch.tensor([PROMPTS[0]])
    patch(model)
    model.to(torch.bfloat16)
    with pytest.raises(
        ca.InputError, match="is bfloat16 on cpu and was patched as float32 on cpu; unpatch it and patch"
    ):
        logits(model, ids)
    unpatch(model)
    patch(model)
    assert logits(model, ids).dtype == torch.bfloat16


def test_the_package_does_not_import_torch():
    code = "import sys, cupy_attn, cupy_attn.integrations; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# How fast it is.


def run_tool(*args, status=0):
    result = CliRunner().invoke(patch_speed.main, [str(a) for a in args])
    assert result.exit_code == status, result.output
    return result.stdout


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_tool_times_a_model_plain_and_patched(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(patch_speed, "ROUNDS", 1)
    save(make_model(dtype=getattr(torch, dtype)), tmp_path / "model")
    options = ("--batch", 1, "--batch", 3, "--prompt", 12, "--new", 4, "--dtype", dtype, "--json", tmp_path / "r.json")
    printed = run_tool(tmp_path / "model", *options)
    assert "model, " + dtype in printed
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [(row["batch"], row["prompt"], row["new"]) for row in rows] == [(1, 12, 4), (3, 12, 4)]
    for row, line in zip(rows, printed.splitlines()[-2:], strict=True):
        assert 0 < row["patched_logit_error"] < row["plain_logit_error"] < 0.5
        assert min(row[f"{name}_tokens_per_s"] for name in ("plain", "patched")) > 0
        assert line.startswith(f"| {row['batch']} | 12 | 4 | {row['plain_tokens_per_s']:.1f} | ")


def test_the_tool_takes_no_more_than_a_models_positions(tmp_path):
    save(make_model(), tmp_path / "model")
    said = "are more than the model's 256 positions; take fewer."
    result = CliRunner().invoke(patch_speed.main, [str(tmp_path / "model"), "--prompt", "250", "--new", "7"])
    assert (result.exit_code, result.stderr) == (1, f"Error: a prompt of 250 tokens and an answer of 7 {said}\n")
    result = CliRunner().invoke(patch_speed.main, ["--prompt", "4096"])
    assert "more than the model's 4096 positions" in result.stderr
    result = CliRunner().invoke(patch_speed.main, [str(tmp_path)])
    assert (
        result.stderr
        == f"Error: {tmp_path / 'config.json'} does not exist; name a model folder that holds config.json.\n"
    )


def test_the_tool_fails_if_patching_costs_accuracy(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(patch_speed, "speeds", lambda *_: {f"{name}_{what}": 1.0 for name in ("plain", "patched")
                                                           for what in ("prompt_ms", "tokens_per_s")})  # fmt: skip
    errors = iter((0.1, 0.2))
    monkeypatch.setattr(patch_speed, "logit_error", lambda *_: next(errors))
    save(make_model(), tmp_path / "model")
    run_tool(tmp_path / "model", "--batch", 1, "--prompt", 4, "--new", 2, status=1)


# On a GPU.

# A choice is sure where two logits are further apart than this many times the dtype's noise: the root mean square, over
# a position's logits, of what the dtype costs transformers' own model there. On the CPU the patched model's error is
# half of that, at worst 0.97; the largest gap it closed was 1.2 times it in bfloat16, 0.7 in float16.
NOISE_MARGINS = 3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_model_of_28_layers_says_what_float32_says(dtype):
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no GPU")
    ids, mask = (t.cuda() for t in left_padded([list(range(5, 5 + n)) for n in (40, 7, 23, 1)]))
    # Few tokens to choose from, and none nearer for having been said, so that float32 is often sure.
    model = random_model(dtype, "cuda", vocab_size=4096, tie_word_embeddings=False)
    wide = copy.deepcopy(model).float()
    new = 64
    truth = wide.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)
    shown = torch.cat([mask, torch.ones_like(truth[:, mask.shape[1] :])], 1)
    expected = logits(wide, truth, shown)
    start = ids.shape[1]
    wanted = expected[:, start - 1 : -1]
    own = logit_error(model, truth, shown, expected)
    noise = (logits(model, truth, shown)[:, start - 1 : -1].float() - wanted).square().mean(-1).sqrt()
    patch(model, capacity=256)
    ours = logit_error(model, truth, shown, expected)
    assert ours < own, (ours, own)
    # Token by token, wherever float32 is sure of its choice by more than the dtype's noise.
    cache = transformers.DynamicCache(config=model.config)
    steps = [logits(model, truth[:, :start], shown[:, :start], past_key_values=cache)[:, -1:].float()]
    for t in range(start, truth.shape[1] - 1):
        part = logits(model, truth[:, t : t + 1], shown[:, : t + 1], past_key_values=cache)
        steps.append(part.float())
    chosen = torch.cat(steps, 1)
    best = wanted.topk(2).values
    sure = best[..., 0] - best[..., 1] > NOISE_MARGINS * noise
    assert sure.float().mean() > 0.1
    assert torch.equal(chosen.argmax(-1)[sure], truth[:, start:][sure])
