"""Dump what a transformers Qwen3 model computes inside its attention, stage by stage, for ``cupy-attn verify``.

The model takes the prompt at once, then some tokens one at a time, greedily. For each layer asked for, one file holds
the hidden states that entered it, their positions, every stage (named as in ``cupy_attn.reference.STAGES``), the
entropy of each row of probabilities, and the projected output y, of prompt and steps in one sequence; the metadata say
how many tokens were the prompt, and the config, dtype and versions. Row maxima, sums and entropies are of the rotated
queries and keys as dumped, in float64. Needs the hf extra.

    python tools/dump_transformers.py MODEL --layers 0,5-7 --prompt-ids 1,2,3 --steps 4 --out dump.safetensors
    cupy-attn verify MODEL dump-layer5.safetensors --layer 5
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import transformers

import cupy_attn as ca
from cupy_attn import io
from cupy_attn.arrays import as_array
from cupy_attn.errors import CupyAttnError, FileError
from cupy_attn.health import measure_rows
from cupy_attn.terminal import layer_ranges

DTYPES = ("auto", "float16", "bfloat16", "float32")


class Recorder:
    """Collects the stages of one decoder layer, call by call.

    Parameters
    ----------
    layer : Module
        A Qwen3 decoder layer of transformers.
    config : AttentionConfig
        Of its model.
    """

    def __init__(self, layer: Any, config: ca.AttentionConfig) -> None:
        self._config = config
        self._parts: dict[str, list[np.ndarray]] = {}
        attention = layer.self_attn
        self._rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        self._last: dict[str, torch.Tensor] = {}
        self._hooks = [
            layer.register_forward_pre_hook(self._enter, with_kwargs=True),
            layer.input_layernorm.register_forward_hook(self._keep("input_norm")),
            attention.q_proj.register_forward_hook(self._keep("q")),
            attention.k_proj.register_forward_hook(self._keep("k")),
            attention.v_proj.register_forward_hook(self._keep("v")),
            attention.q_norm.register_forward_hook(self._keep("q_norm")),
            attention.k_norm.register_forward_hook(self._keep("k_norm")),
            attention.o_proj.register_forward_pre_hook(lambda module, args: self._add("attention", args[0])),
            attention.o_proj.register_forward_hook(self._keep("output")),
            layer.register_forward_hook(self._leave),
        ]

    def _add(self, name: str, value: torch.Tensor) -> None:
        self._last[name] = value
        self._parts.setdefault(name, []).append(as_array(name, value.detach().cpu().contiguous()).copy())

    def _keep(self, name: str) -> Any:
        return lambda module, args, output: self._add(name, output)

    def _enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._add(io.HIDDEN_NAMES[0], args[0] if args else kwargs["hidden_states"])
        self._add(io.POSITIONS, kwargs["position_ids"])
        self._angles = kwargs["position_embeddings"]

    def _leave(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        """Rotate as the layer did: it has no module for it."""
        q, k = (self._last[name].transpose(1, 2) for name in ("q_norm", "k_norm"))
        for name, rotated in zip(("q_rope", "k_rope"), self._rotate(q, k, *self._angles), strict=True):
            self._add(name, rotated.transpose(1, 2))

    def arrays(self, index: int) -> dict[str, np.ndarray]:
        """Return what layer ``index`` did with all tokens, by the names of a dump, and forget the hooks."""
        for hook in self._hooks:
            hook.remove()
        c = self._config
        whole = {name: np.concatenate(parts, axis=1) for name, parts in self._parts.items()}
        tokens = whole["q"].shape[:2]
        for name, heads in (("q", c.num_attention_heads), ("k", c.num_key_value_heads), ("v", c.num_key_value_heads),
                            ("attention", c.num_attention_heads)):  # fmt: skip
            whole[name] = whole[name].reshape(*tokens, heads, c.head_dim)
        rows = measure_rows(whole[io.POSITIONS], c.window(index), qk=(whole["q_rope"], whole["k_rope"]))
        statistics = {"row_max": rows.largest, "lse": rows.lse, "entropy": rows.entropy}
        whole |= {name: value.astype(np.float32) for name, value in statistics.items()}
        return whole | {io.OUTPUT: whole["output"]}


def record(model: Any, layers: list[int], ids: list[int], steps: int) -> tuple[dict[int, dict[str, Any]], list[int]]:
    """Run a prompt and some greedy steps; return every layer's arrays and the tokens that the steps took.

    Raises
    ------
    click.ClickException
        The model has no such token or position.
    """
    config, vocabulary = ca.AttentionConfig.from_dict(model.config.to_dict()), model.config.vocab_size
    for token in ids:
        if not 0 <= token < vocabulary:
            raise click.ClickException(f"token {token} does not exist; the vocabulary has 0 to {vocabulary - 1}.")
    if len(ids) + steps > config.max_position:
        raise click.ClickException(f"{len(ids)} tokens and {steps} steps are more than the model's "
                                   f"{config.max_position} positions; take fewer.")  # fmt: skip
    recorders = {index: Recorder(model.model.layers[index], config) for index in layers}
    cache, taken = transformers.DynamicCache(config=model.config), []
    tokens = torch.tensor([ids], device=model.device)
    with torch.no_grad():
        for step in range(steps + 1):
            logits = model(tokens, None, None, cache, use_cache=True).logits  # by place: transformers 5.24 renamed it
            tokens = logits[:, -1:].argmax(-1)
            if step < steps:
                taken.append(int(tokens[0, 0]))
    return {index: recorder.arrays(index) for index, recorder in recorders.items()}, taken


def layers_of(option: str, count: int) -> list[int]:
    """Return the layers that ``--layers`` names, of a model that has ``count``.

    Raises
    ------
    click.ClickException
        The model has no such layer.
    """
    ranges = layer_ranges(option)
    if ranges is None:
        return list(range(count))
    largest = max(last for _, last in ranges)
    if largest >= count:
        raise click.ClickException(f"layer {largest} does not exist; the model has layers 0 to {count - 1}.")
    return sorted({index for first, last in ranges for index in range(first, last + 1)})


def loaded(model: str, device: str, load: Callable[[], Any]) -> Any:
    """Return what transformers loads of a model, or end with a sentence."""
    try:
        return load()
    except (OSError, ValueError, RuntimeError, AssertionError) as error:  # the last: PyTorch without CUDA
        said = (str(error).splitlines() or [type(error).__name__])[0]
        if Path(model).is_dir():
            raise click.ClickException(f"transformers cannot load {model} on {device}: {said}") from None
        raise click.ClickException(
            f"{model} is no folder, and transformers finds no model of that name ({said}); name a model folder."
        ) from None


def whole_numbers(context: click.Context, parameter: click.Parameter, text: str | None) -> list[int] | None:
    """Read numbers with commas or spaces between them."""
    if text is None:
        return None
    words = re.split(r"[,\s]+", text.strip(", "))
    if not all(re.fullmatch(r"\d+", word) for word in words):
        raise click.BadParameter(f"{text!r} is not a list of numbers, such as 0,5.")
    return [int(word) for word in words]


@click.command()
@click.argument("model")
@click.option("--layers", default="0", show_default=True, help="Which layers: 'all', or such as 0,5-7.")
@click.option("--prompt-ids", callback=whole_numbers, help="The prompt as token ids, such as 97,11,879.")
@click.option("--prompt", help="The prompt as text, for the model's tokenizer.")
@click.option(
    "--steps", type=click.IntRange(0), default=4, show_default=True, help="Tokens after the prompt, one by one."
)
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True, help="To run the model in.")
@click.option("--device", default="cpu", show_default=True, help="PyTorch's name of a device.")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="A .safetensors file; of several layers NAME-layerN."
)
def main(
    model: str,
    layers: str,
    prompt_ids: list[int] | None,
    prompt: str | None,
    steps: int,
    dtype: str,
    device: str,
    out: Path,
) -> None:
    """Run a transformers Qwen3 MODEL, a folder or a name, and dump stages of its attention layers.

    Several layers go to files of their own, named as --out with -layerN.
    """
    if (prompt_ids is None) == (prompt is None):
        raise click.UsageError("give the prompt once, as --prompt-ids or as --prompt.")
    if out.suffix != ".safetensors":
        raise click.UsageError(f"--out is {out}; dumps are .safetensors files.")
    config = loaded(model, device, lambda: transformers.AutoConfig.from_pretrained(model))
    try:
        ca.AttentionConfig.from_dict(config.to_dict())
    except CupyAttnError as error:
        raise click.ClickException(f"the model's config does not fit: {error}") from None
    chosen = layers_of(layers, config.num_hidden_layers)
    files = {index: out if len(chosen) == 1 else out.with_stem(f"{out.stem}-layer{index}") for index in chosen}
    try:
        for file in files.values():
            io.check_output(file)
    except FileError as error:
        raise click.ClickException(str(error)) from None
    network = loaded(
        model, device, lambda: transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device).eval()
    )
    ids = prompt_ids or loaded(
        model, device, lambda: transformers.AutoTokenizer.from_pretrained(model)(prompt)["input_ids"]
    )
    if not ids:
        raise click.UsageError(f"the prompt is no token to {model}; give --prompt-ids if it has no tokenizer.")
    arrays, taken = record(network, chosen, ids, steps)
    for index, file in files.items():
        metadata = {
            "format": io.DUMP_FORMAT, "made_by": f"transformers {transformers.__version__}, torch {torch.__version__}",
            "layer": str(index), "dtype": str(network.dtype).removeprefix("torch."), "prompt_tokens": str(len(ids)),
            "token_ids": json.dumps([*ids, *taken]),
            "config": json.dumps(ca.AttentionConfig.from_dict(network.config.to_dict()).to_dict()),
        }  # fmt: skip
        io.save_arrays(file, arrays[index], metadata)
        where = f"layer {index}, {len(ids)} tokens and {steps} steps, {metadata['dtype']}"
        click.echo(f"Wrote {where} to {file}; check it: cupy-attn verify {model} {file} --layer {index}")


if __name__ == "__main__":
    main()
