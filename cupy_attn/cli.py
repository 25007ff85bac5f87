"""The command line: ``cupy-attn demo | run | verify | inspect | warmup | doctor | bench``."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from . import __version__, cuda, io, kernels, launch
from . import demo as demo_model
from .arrays import STORAGE_DTYPES, to_numpy
from .cache import KVCache
from .cli_bench import bench
from .cli_inputs import ANGLES, DTYPE, POSITIONS, convert, device_name, given_positions, load_layer, natural_dtype
from .cli_inspect import inspect
from .cli_verify import verify
from .config import AttentionConfig
from .errors import CupyAttnError, CupyAttnWarning, DeviceError, FileError, InputError
from .layer import Attention
from .plan import check_cache, check_positions
from .reference import STAGES
from .terminal import DEVICE, JSON, KEY, MODEL, PATH, echo_json, layer_ranges, table, verdict
from .verify import verify_layer
from .weights import AttentionWeights, read_norms

RUN_STAGES = tuple(name for name in STAGES if name not in ("scores", "probs"))
CHUNK_TOKENS = 1024  # tokens between two steps of the progress bar
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class _Cli(click.Group):
    """Turns this package's errors into one line and exit status 1, and Ctrl-C into status 130."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _warnings_as_lines():
                return super().invoke(ctx)
        except CupyAttnError as error:
            raise click.ClickException(str(error)) from None
        except MemoryError as error:
            raise click.ClickException(f"out of memory ({error}); use fewer tokens or a smaller batch.") from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # whoever read the output has left; click ends quietly
                raise
            where = "" if error.filename is None else f"{error.filename}: "
            raise click.ClickException(f"{where}{error.strerror or error}; name another place.") from None
        except KeyboardInterrupt:
            newline = "\n" if sys.stderr.isatty() else ""  # after the terminal's ^C
            click.echo(f"{newline}Interrupted: no file was left half written.", err=True)
            ctx.exit(INTERRUPTED)


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("always", CupyAttnWarning)
        usual = warnings.showwarning

        def show(message: Any, category: Any, *rest: Any, **more: Any) -> None:
            if issubclass(category, CupyAttnWarning):
                click.echo(f"Warning: {message}", err=True)
            else:
                usual(message, category, *rest, **more)

        warnings.showwarning = show
        yield


@click.group(cls=_Cli, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def main() -> None:
    """Run, check and look into one Qwen3 attention layer, without PyTorch.

    \b
    New here? This makes a small checkpoint, runs a layer of it and verifies it:
        cupy-attn demo demo
    """


for command in (verify, inspect, bench):
    main.add_command(command)


@main.command()
@click.argument("folder", type=PATH)
@click.option("--force", is_flag=True, help="Replace an earlier demo in the folder.")
@DEVICE
def demo(folder: Path, force: bool, device: str) -> None:
    """Make a small Qwen3 checkpoint in FOLDER, run a layer of it, verify it.

    The checkpoint is laid out as transformers does (config.json, sharded safetensors) and its K-norm weights
    reach the 96.5 of Qwen3-0.6B. Beside it go activations to run a layer on and a dump to verify against.
    """

    def say(what: str) -> None:
        if sys.stderr.isatty():
            click.echo(f"  {what} ...", err=True)

    problem = cuda.problem() if device == "cuda" else None
    if problem:  # before anything is written
        raise DeviceError(problem)
    with io.new_folder(folder, replaceable=demo_model.FILES if force else None) as temporary:
        demo_model.write_checkpoint(temporary, say)
        demo_model.write_dumps(temporary, 0, say)
    config = AttentionConfig.from_pretrained(folder)
    weights = AttentionWeights.from_pretrained(folder, 0, config=config)
    dump_file = folder / "dump-layer0.safetensors"
    click.echo(f"Wrote {folder}/: a Qwen3 checkpoint of {config.num_hidden_layers} layers, hidden_size "
               f"{config.hidden_size}, {config.num_attention_heads}:{config.num_key_value_heads} heads of "
               f"{config.head_dim}, max |k_norm.weight| {weights.k_norm_stats.max_abs:g}.")  # fmt: skip
    dump = io.load_dump(dump_file)
    failed = False
    for dtype in STORAGE_DTYPES:
        layer = Attention(config, weights, dtype, device)
        result = verify_layer(layer, dump.hidden_states.astype(layer.dtype))
        row = next(r for r in result.reference if r.stage == io.OUTPUT)
        failed |= not result.passed
        click.echo(f"Layer 0 in {dtype} on the {device_name(layer.device)}: relative L2 error {row.relative_l2:.2g} "
                   f"against the float64 reference, bar {row.bar:g}: {verdict(result.passed)}.")  # fmt: skip
    where = shlex.quote(str(folder))
    click.echo(
        "\nTry next:\n"
        f"  cupy-attn inspect {where}\n"
        f"  cupy-attn verify {where} {where}/dump-layer0.safetensors\n"
        f"  cupy-attn run {where} {where}/hidden_states.npy --layer 3 --out y.safetensors --stages q_norm,k_norm\n"
        "  cupy-attn bench --model 0.6B --tokens 512"
    )
    if failed:
        raise click.exceptions.Exit(1)


@main.command()
@MODEL
@click.argument("activations", type=PATH)
@click.option("--layer", type=int, default=0, show_default=True, help="Index of the layer, from 0.")
@click.option("--out", type=PATH, help="Where the output goes: .npy, .npz or .safetensors.")
@click.option("--stages", help=f"Intermediates to write too: 'all' or any of {', '.join(RUN_STAGES)}.")
@POSITIONS
@click.option("--residual/--no-residual", default=False, help="Add the input to the output, as a decoder layer does.")
@click.option("--cache-in", type=PATH, help="Go on from a cache that --cache-out wrote.")
@click.option("--cache-out", type=PATH, help="Write the cache after the run (.safetensors).")
@KEY
@DTYPE
@DEVICE
@ANGLES
@JSON
def run(
    model: Path,
    activations: Path,
    layer: int,
    out: Path | None,
    stages: str | None,
    positions: str | None,
    residual: bool,
    cache_in: Path | None,
    cache_out: Path | None,
    key: str | None,
    dtype: str | None,
    device: str,
    angles: str,
    as_json: bool,
) -> None:
    """Run one layer of MODEL on ACTIVATIONS (.npy, .npz or .safetensors).

    Activations are [tokens, hidden] or [batch, tokens, hidden]; the output, named y, has the same shape and goes to
    --out. Without --out only a summary is printed. With --stages the file also holds the activations and positions,
    unless --residual or --cache-in is given, and is then a dump that `cupy-attn verify` takes; a .safetensors file says
    which layer it is of. Exit status 1 if the output is not finite.
    """
    wanted = _stage_names(stages)
    if wanted and out is None:
        raise click.UsageError("--stages needs --out, a .npz or .safetensors file to write them to.")
    if out is not None:
        io.check_output(out, 1 + len(wanted))
    if cache_out is not None:
        io.check_output(io.check_cache_path(cache_out))
        if out is not None and out.absolute() == cache_out.absolute():
            raise click.UsageError(f"--out and --cache-out are both {out}; name two files.")
    dump = io.load_dump(activations, key)
    attention = load_layer(model, layer, dtype or natural_dtype(dump.hidden_states), device, angles)
    x = convert(activations, dump.hidden_states, attention)
    batch, seq, _ = x.shape
    cache = attention.new_cache(batch, seq) if cache_in is None else io.load_cache(cache_in, attention, room=seq)
    given = given_positions(positions, dump.positions, seq)
    y, collected = _run_chunks(attention, x, cache, given, residual, wanted)

    if not dump.batched:
        y, collected = y[0], {name: stage[0] for name, stage in collected.items()}
    if out is not None:
        metadata = {"made_by": "cupy-attn run", "model": str(model), "layer": str(layer), "dtype": str(attention.dtype)}
        arrays = {io.OUTPUT: y, **collected}
        if wanted and cache_in is None and not residual:
            inputs = (x, cache.positions) if dump.batched else (x[0], cache.positions[0])
            arrays |= dict(zip((io.HIDDEN_NAMES[0], io.POSITIONS), inputs, strict=True))
        io.save_arrays(out, arrays, metadata)
    if cache_out is not None:
        io.save_cache(cache_out, cache)
    wide = y.astype(np.float64)
    finite = bool(np.isfinite(wide).all())
    rms, largest = float(np.sqrt(np.mean(wide**2))), float(np.abs(wide).max())
    if as_json:
        echo_json({
            "model": str(model), "layer": layer, "dtype": str(attention.dtype), "device": attention.device,
            "shape": list(y.shape), "finite": finite, "rms": rms, "max_abs": largest, "precise": attention.precise,
            "cached_tokens": cache.lengths.tolist(), "out": None if out is None else str(out),
            "stages": list(collected), "cache_out": None if cache_out is None else str(cache_out),
        })  # fmt: skip
    else:
        where = f"{attention.dtype} on the {device_name(attention.device)}"
        ran = f"Layer {layer} of {model} on {batch} x {seq} tokens, {where}"
        click.echo(f"{ran}: rms {rms:.4g}, max |y| {largest:.4g}{'' if finite else ', NOT FINITE'}.")
        if out is not None:
            click.echo(f"Wrote {', '.join([io.OUTPUT, *collected])} to {out}.")
        if cache_out is not None:
            click.echo(f"Wrote the cache of {', '.join(map(str, cache.lengths))} tokens to {cache_out}.")
    if not finite:
        raise click.exceptions.Exit(1)


@main.command()
@MODEL
@click.option("--dtype", "dtypes", type=click.Choice(list(STORAGE_DTYPES)), multiple=True,
              default=("float16", "bfloat16"), show_default=True, help="Storage dtype; can be repeated.")  # fmt: skip
@click.option("--layers", default="all", show_default=True, help="Layers to build for: 'all', or such as 0,5-7.")
@click.option("--arch", "archs", multiple=True,
              help="Compile for this architecture instead, such as sm_90a, and print registers and spills; needs no "
              "GPU and keeps nothing; can be repeated.")  # fmt: skip
@click.option("--verbose", is_flag=True, help="Print the time of every kernel.")
@JSON
def warmup(
    model: Path, dtypes: tuple[str, ...], layers: str, archs: tuple[str, ...], verbose: bool, as_json: bool
) -> None:
    """Build the kernels that MODEL needs on this GPU into CuPy's cache, so that no first call waits for them.

    Reads config.json and the Q-norm and K-norm weights, nothing else. Exit status 1 if a kernel fails to build; the
    others are built all the same. Importing the package builds the common kernels by itself: with
    CUPY_ATTN_DEFER_BUILD=1 they are built, and counted, here.
    """
    from . import warmup as warming

    for arch in archs:
        _check_arch(arch)
    ranges = layer_ranges(layers)
    if not archs:
        _check_gpu_and_cache()
    config = AttentionConfig.from_pretrained(model)
    norms = _chosen_layers(layers, ranges, list(read_norms(model, config)))
    pairs = warming.needed(config, norms, [STORAGE_DTYPES[name] for name in dict.fromkeys(dtypes)])
    without = {name: why for name in dict.fromkeys(dtypes) if (why := launch.supported(config, name)) is not None}
    builds: list[Callable[[], Any]]
    if archs:
        builds = [functools.partial(warming.build_offline, arch, *pair) for arch in dict.fromkeys(archs)
                  for pair in pairs if kernels.compiles_for(pair[0], arch)]  # fmt: skip
    else:
        builds = [warming.on_this_gpu(functools.partial(warming.build_here, *pair)) for pair in pairs]
    start = time.perf_counter()
    with _build_progress(len(builds), quiet=as_json) as done:
        results = warming.build_all(builds, done)
    seconds = time.perf_counter() - start
    counts = {status: sum(r.status == status for r in results) for status in ("built", "cached", "failed")}
    if as_json:
        echo_json({
            "model": str(model), "dtypes": list(dict.fromkeys(dtypes)), "layers": [index for index, *_ in norms],
            **counts, "seconds": seconds, "no_kernels": without,
            "kernels": [dataclasses.asdict(r) | {"macros": dict(r.macros)} for r in results],
        })  # fmt: skip
    else:
        for name, why in without.items():
            click.echo(f"Note: layers in {name} have no kernels and run as separate array operations, because {why}.",
                       err=True)  # fmt: skip
        if results and (archs or verbose):
            click.echo(_build_table(results, bool(archs), verbose))
        told = f"Built {counts['built']} kernels in {seconds:.1f} s, {counts['cached']} came from the cache"
        click.echo(f"{told}, {counts['failed']} failed." if counts["failed"] else f"{told}.")
    for message in dict.fromkeys(r.error for r in results if r.error):
        click.echo(f"Error: {message}", err=True)
    if counts["failed"]:
        raise click.exceptions.Exit(1)


@main.command()
@click.option("--compile", "everything", is_flag=True,
              help="Compile every common kernel for the cold compile time, however long that takes.")  # fmt: skip
@JSON
def doctor(everything: bool, as_json: bool) -> None:
    """Print versions, GPU, NVRTC, the time of a cold compile, kernel cache and a self-test.

    Exit status 1 if the self-test fails. A machine without a GPU is healthy: the layer then runs on the CPU. The cold
    compile builds the common kernels past every cache and begins no more of them after 20 s.
    """
    from .doctor import examine

    if sys.stderr.isatty() and not as_json:
        click.echo("  compiling and testing ...", err=True)
    report = examine(everything)
    if as_json:
        echo_json(report)
    else:
        for section in ("versions", "cpu", "gpu", "nvrtc", "cache"):
            click.echo(f"{section}:")
            for name, value in report[section].items():
                click.echo(f"  {name:24} {value}")
        click.echo("self-test (one layer with the K-norm weights of Qwen3-0.6B layer 0, against float64):")
        for row in report["self_test"]:
            error = row.get("why") or f"relative L2 {row['relative_l2']:.2g}, bar {row['bar']:g}"
            click.echo(f"  {row['device']:5} {row['dtype']:9} {error}: {verdict(row['passed'])}")
    if not report["ok"]:
        raise click.exceptions.Exit(1)


def _stage_names(stages: str | None) -> list[str]:
    if stages is None:
        return []
    if stages == "all":
        return list(RUN_STAGES)
    names = [name.strip() for name in stages.split(",") if name.strip()]
    unknown = [name for name in names if name not in RUN_STAGES]
    if unknown or not names:
        raise click.UsageError(f"--stages {stages}: choose 'all' or some of {', '.join(RUN_STAGES)}.")
    return names


def _run_chunks(
    attention: Attention,
    x: np.ndarray,
    cache: KVCache,
    positions: np.ndarray | None,
    residual: bool,
    wanted: Sequence[str],
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Run the layer some tokens at a time, so that progress can be shown and Ctrl-C is heard."""
    batch, seq, _ = x.shape
    config, counts = attention.config, np.full(batch, seq)
    # The whole is checked before the first chunk is run.
    check_cache(cache, config, attention.layer, attention.dtype, batch, cache.xp)
    positions = check_positions(positions, config, cache, counts, seq)
    cache.check_room(counts)
    outputs: list[np.ndarray] = []
    parts: list[dict[str, Any]] = []
    # Past its trained length, dynamic RoPE turns by an angle that depends on the call's last token.
    whole = config.rope.rope_type == "dynamic" and int(positions.max()) >= config.max_position_embeddings
    step = seq if whole else CHUNK_TOKENS
    starts = range(0, seq, step)
    with _progress(starts, "running") as steps:
        for start in steps:
            chunk = slice(start, start + step)
            stages: dict[str, Any] | None = {} if wanted else None
            outputs.append(attention(
                x[:, chunk], cache, residual=x[:, chunk] if residual else None, stages=stages,
                positions=positions[:, chunk]))  # fmt: skip
            parts.append(stages or {})
    collected = {
        name: np.concatenate([to_numpy(p[name]) for p in parts], axis=2 if name in ("row_max", "lse") else 1)
        for name in wanted
    }
    return np.concatenate(outputs, axis=1), collected


@contextlib.contextmanager
def _progress(items: Sequence[int], label: str) -> Iterator[Any]:
    """Show a bar on standard error if it is a terminal and there is more than one step."""
    if len(items) > 1 and sys.stderr.isatty():
        with click.progressbar(items, label=label, file=sys.stderr) as bar:
            yield bar
    else:
        yield items


def _check_arch(arch: str) -> None:
    from .warmup import known_to_nvrtc

    name = re.fullmatch(r"sm_(\d+)[a-z]?", arch)
    tested = ", ".join(kernels.ARCHITECTURES)
    if name is None:
        raise click.UsageError(f"--arch {arch}: name one as NVRTC does, such as {tested}.")
    if divmod(int(name[1]), 10) < cuda.MIN_CAPABILITY:
        raise click.UsageError(
            f"--arch {arch}: the kernels need compute capability 8.0; name a later one, such as {tested}."
        )
    if not known_to_nvrtc(arch):
        raise click.UsageError(f"--arch {arch}: this NVRTC does not know it; name one that it does, such as {tested}.")


def _chosen_layers(
    option: str, ranges: list[tuple[int, int]] | None, norms: list[tuple[int, np.ndarray, np.ndarray]]
) -> list[tuple[int, np.ndarray, np.ndarray]]:
    if ranges is None:
        return norms
    largest = max(last for _, last in ranges)
    if largest >= len(norms):
        raise InputError(f"--layers {option} asks for layer {largest}, the checkpoint has 0 to {len(norms) - 1}; name "
                         "some of those.")  # fmt: skip
    return [row for row in norms if any(first <= row[0] <= last for first, last in ranges)]


def _check_gpu_and_cache() -> None:
    problem = cuda.problem()
    if problem is not None:
        cure = problem.removesuffix(".").replace("use device='cpu' or ", "")
        raise DeviceError(f"{cure}, or pass --arch sm_90a to compile for the GPU of another machine.")
    problem = kernels.cache_problem()
    if problem is not None:
        raise FileError(problem)


@contextlib.contextmanager
def _build_progress(count: int, *, quiet: bool) -> Iterator[Callable[[Any], None]]:
    """Yield what to call with each kernel built: a bar on a terminal, a line each where there is none."""
    if quiet:
        yield lambda result: None
    elif sys.stderr.isatty():
        with click.progressbar(length=count, label="building", file=sys.stderr) as bar:
            yield lambda result: bar.update(1)
    else:
        number = iter(range(1, count + 1))
        yield lambda result: click.echo(f"{next(number)}/{count} {_kernel_name(result)}", err=True)


def _build_table(results: Sequence[Any], offline: bool, verbose: bool) -> str:
    header = ["kernel", *(["arch", "registers", "spilled bytes"] if offline else []),
              *(["seconds"] if verbose else []), "outcome"]  # fmt: skip
    rows = []
    for r in results:
        numbers = ["-" if n is None else str(n) for n in (r.registers, r.spill_bytes)]
        rows.append([_kernel_name(r), *([r.arch, *numbers] if offline else []),
                     *([f"{r.seconds:.2f}"] if verbose else []), r.status])  # fmt: skip
    return table(header, rows)


def _kernel_name(result: Any) -> str:
    return " ".join([result.name, *(f"{key}={value}" for key, value in result.macros)])
