"""What compute-sanitizer watches: every kernel on small inputs, compared with the reference.

python tools/small_case.py [--share 1/3]
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import click
import cupy
import numpy as np
from stacks import check_gpu

import cupy_attn as ca
from cupy_attn import kernels, reference
from cupy_attn.accuracy import BARS, compare_stages
from cupy_attn.bench import random_layer
from cupy_attn.demo import k_norm_weight
from cupy_attn.weights import multiplies_rest

DTYPES = ("float16", "bfloat16")
SMALL = {"head_dim": 128, "rope_theta": 1e6, "max_position_embeddings": 4096}
SMALL_WINDOW = 40
# Tokens, heads, columns and multiprocessors for which project_*_few_wgmma take clusters of 160 and 192 rows of weights,
# 144 and 64, 224 and 96, 192 and 144, of 1, 2 and 4 blocks; and two tiles of tokens, there and with 128 and 96, 192 and
# 128, 256 and 160 rows.
FEW_TILES = (
    (12, (4, 2), 512, 14), (64, (6, 2), 512, 40), (12, (6, 2), 512, 27), (24, (2, 2), 576, 8), (140, (2, 2), 576, 8),
)  # fmt: skip
MORE_FEW_TILES = ((140, (2, 2), 512, 54), (140, (2, 2), 512, 16), (140, (2, 2), 1024, 7))  # on the normal path
# Columns and multiprocessors for which decode_project takes 4, 4, 3 and 5 tiles of rows a block, all of them under way
# at once only in the first case; and tokens. Heads, columns and multiprocessors for which decode_output takes 1, 2 and
# 3, and never all at once.
PROJECT_TILES = ((776, 32, (1, 4, 8)), (1032, 32, (4, 8)), (1288, 43, (4, 8)), (520, 26, (4, 8)))
# The same for decode_project_folded, of columns for which there are weights with the input norm's in them.
FOLDED_TILES = ((1024, 32, (1, 8)), (1088, 32, (4, 8)), (1344, 43, (4, 8)), (768, 26, (4, 8)))
OUTPUT_TILES = (((18, 2), 128, None), ((18, 2), 128, 4), ((10, 2), 512, 22))
# Calls, heads and multiprocessors for which a KV head has 5, 9 and 9 queries, with decode_combine and without.
LARGER_NORMS = (((1,), (10, 2), 22), ((1,), (18, 2), None), ((1,), (18, 2), 4))
# Heads, columns and multiprocessors for which decode_project and decode_output read rows as lines, 4, 5, 8 and 10 steps
# to a unit and 8, 10 and 16, in one round of units and in several.
LINES = (
    ((2, 1), 2048, 8), ((2, 1), 2560, 6), ((2, 1), 4096, 8), ((2, 1), 5120, 40),
    ((32, 1), 512, 12), ((40, 1), 520, 132), ((64, 1), 520, 12),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Small:
    """A small run: ``calls`` are the new tokens of each call on one cache.

    512 columns are 8 steps of a product, more than there are buffers for. 130 tokens are several tiles of rows and of
    keys. With ``num_sms`` the kernels are launched as for a GPU of so many multiprocessors: they take the tiles of long
    prompts, and one block goes through many of them. ``portable``: as for a GPU before Hopper. ``rest``: with norm
    weights for which prefill multiplies what rounding hidden states leaves over, and attention looks for each step's
    largest score. ``heads`` are query and KV heads; in decode 16 query heads of one KV head are two tiles. On a Hopper
    GPU the runs take every specialisation that an import builds (test_gpu_report.py).
    """

    dtype: str
    precise: bool
    batch: int = 1
    calls: tuple[int, ...] = (130, 40, 1, 1)
    heads: tuple[int, int] = (4, 2)
    hidden_size: int = 512
    num_sms: int | None = None
    portable: bool = False
    window: int | None = None
    stages: bool = False
    batch_invariant: bool = False
    rest: bool = False

    @property
    def shape(self) -> dict[str, int]:
        """The fields of a model's config."""
        heads = dict(zip(("num_attention_heads", "num_key_value_heads"), self.heads, strict=True))
        return {"hidden_size": self.hidden_size} | heads

    @property
    def text(self) -> str:
        """Every field that is not False."""
        fields = dataclasses.asdict(self)
        return ", ".join(f"{name} {value}" for name, value in fields.items() if value not in (None, False))


def small_runs() -> list[Small]:
    """Return what together launches every kernel, in both dtypes, on both paths."""
    both = [(dtype, precise) for dtype in DTYPES for precise in (False, True)]
    crossed = both[0], both[3]
    return [
        *(Small(*kind) for kind in both),  # prefill, chunked prefill, decode of few sequences
        *(Small(dtype, False, calls=(130, 70), num_sms=n, rest=True) for dtype in DTYPES for n in (2, None)),
        *(Small(*kind, batch=12, calls=(70, 1), num_sms=2) for kind in both),  # decode of many
        *(Small(*kind, batch=12, calls=(20, 1), heads=(16, 1), num_sms=100) for kind in both),
        *(Small(*kind, batch=2, calls=(130, 130, 1), num_sms=2) for kind in both),  # from tile to tile, after a past
        *(Small(*kind, calls=(130, 70), heads=(3, 1), num_sms=2) for kind in both),  # no two heads that share keys
        *(Small(dtype, False, calls=(130, 70), heads=(3, 1), num_sms=2, rest=True) for dtype in DTYPES),
        *(Small(*kind, batch=12, calls=(70, 1), num_sms=2, portable=True) for kind in both),
        *(Small(dtype, False, calls=(130, 1), num_sms=num_sms) for dtype in DTYPES for num_sms in (8, 24)),
        # Tiles that two share: blocks of a product; warpgroups of attention, from tile to tile.
        *(Small(dtype, False, calls=(385,), heads=(8, 2), hidden_size=256, num_sms=34) for dtype in DTYPES),
        *(
            Small(dtype, False, batch=batch, calls=(1,), hidden_size=hidden_size, num_sms=num_sms)
            for dtype in DTYPES
            for hidden_size, num_sms, batches in PROJECT_TILES
            for batch in batches
        ),
        *(
            Small("float16", False, batch=batch, calls=(1,), hidden_size=hidden_size, num_sms=num_sms)
            for hidden_size, num_sms, batches in FOLDED_TILES
            for batch in batches
        ),
        *(
            Small(dtype, False, calls=(1,), heads=heads, hidden_size=hidden_size, num_sms=num_sms)
            for dtype in DTYPES
            for heads, hidden_size, num_sms in OUTPUT_TILES + LINES
        ),
        *(
            Small("float16", False, calls=(1,), heads=heads, hidden_size=hidden_size, num_sms=num_sms, rest=True)
            for heads, hidden_size, num_sms in LINES[:4]
        ),
        # What attend_decode does with larger norm weights.
        *(
            Small(dtype, False, calls=calls, heads=heads, num_sms=num_sms, rest=True)
            for dtype in DTYPES
            for calls, heads, num_sms in (((2, 8, 16, 1), (4, 2), None), ((8,), (4, 2), 12), *LARGER_NORMS)
        ),
        Small("bfloat16", False, batch=12, calls=(1,), num_sms=14, rest=True),
        *(Small(*kind, calls=(20, 1), heads=(16, 1)) for kind in both),
        Small("float16", False, calls=(1030, 1), heads=(16, 1), num_sms=1),  # four tiles of keys at a time
        Small("bfloat16", False, calls=(270, 1), heads=(16, 1)),  # parts for decode_combine
        *(Small(*kind, batch=batch, calls=(20, 1), heads=(8, 1)) for kind in both for batch in (1, 12)),
        *(Small(*kind, calls=(2, 8, 16, 1)) for kind in both),  # a few tokens a sequence
        *(Small(*kind, calls=(8,), num_sms=12) for kind in both),
        *(Small(*kind, batch=6, calls=(2, 1)) for kind in crossed),
        *(Small(*kind, batch=12, calls=(3, 1), batch_invariant=True) for kind in crossed),
        *(Small(*kind, batch=64, calls=(1, 1)) for kind in both),
        *(Small(*kind, batch=64, calls=(1, 1), num_sms=12, portable=True) for kind in both),
        *(
            Small(dtype, not portable, batch=32, calls=(1,), num_sms=12, portable=portable)
            for dtype in DTYPES
            for portable in (False, True)
        ),
        *(
            Small(*kind, batch=batch, calls=(1,), heads=heads, hidden_size=hidden_size, num_sms=num_sms)
            for kind in both
            for batch, heads, hidden_size, num_sms in FEW_TILES + (() if kind[1] else MORE_FEW_TILES)
        ),
        *(
            Small(
                "float16",
                False,
                batch=batch,
                calls=(1,),
                heads=heads,
                hidden_size=hidden_size,
                num_sms=num_sms,
                rest=True,
            )
            for batch, heads, hidden_size, num_sms in (*FEW_TILES[:4], (12, (4, 2), 512, 2))
        ),
        *(Small(*kind, calls=(70, 130, 1), window=SMALL_WINDOW) for kind in crossed),
        Small("bfloat16", False, calls=(130,), window=SMALL_WINDOW, num_sms=4),
        *(Small(*kind, calls=(70, 20), stages=True) for kind in crossed),
    ]


def run_small(run: Small) -> tuple[float, set[str]]:
    """Return the relative L2 error of a run, as a share of its bar, and the kernels that it launched.

    Raises
    ------
    SystemExit
        An error is above its bar.
    """
    raw = SMALL | run.shape
    if run.window is not None:
        raw |= {"use_sliding_window": True, "sliding_window": run.window, "max_window_layers": 0}
    config = ca.AttentionConfig.from_dict(raw)
    rng = np.random.default_rng(0)
    statistics = (96.5, 3.56, 9.13) if run.precise else (6.0, 1.0, 0.1) if run.rest else (1.5, 1.0, 0.1)
    weights = dataclasses.replace(random_layer(config), k_norm=k_norm_weight(rng, config.head_dim, *statistics))
    layer = ca.Attention(config, weights, run.dtype, "cuda", batch_invariant=run.batch_invariant)
    assert layer.precise == run.precise
    assert multiplies_rest(config, layer.weights.q_norm, layer.weights.k_norm) == (run.precise or run.rest)
    backend: Any = layer._backend
    assert backend._shape.close_scores != (run.precise or run.rest)
    if run.num_sms is not None:
        backend._limits = dataclasses.replace(backend._limits, num_sms=run.num_sms)
    if run.portable:
        backend._limits = dataclasses.replace(backend._limits, wgmma=False)
    x = rng.standard_normal((run.batch, sum(run.calls), config.hidden_size), np.float32).astype(layer.dtype)
    exact, expected = reference.forward(config, layer.weights, x, residual=x)
    cache = layer.new_cache(run.batch, x.shape[1])
    parts, start = [], 0
    for count in run.calls:
        tokens = slice(start, start + count)
        part = cupy.asarray(np.ascontiguousarray(x[:, tokens]))
        stages: dict[str, Any] | None = {} if run.stages else None
        parts.append(cupy.asnumpy(layer(part, cache, residual=part, stages=stages)))
        for name, stage in (stages or {}).items():
            whole = expected[name]
            want = whole[:, :, tokens] if name in ("row_max", "lse") else whole[:, tokens]
            check_bar(f"{run.text}: {name}", compare_stages({name: stage}, {name: want}, 1)[0].relative_l2, run.dtype)
        start += count
    error = ca.relative_l2(np.concatenate(parts, 1), exact)
    check_bar(f"{run.text}: y", error, run.dtype)
    return error / BARS[run.dtype], {one.name for launches in backend._launches.values() for one in launches}


def check_bar(what: str, error: float, dtype: str) -> None:
    """Exit unless a relative L2 error is within the bar of a dtype."""
    if not error <= BARS[dtype]:
        raise SystemExit(f"{what}: relative L2 {error:.2g}, the bar is {BARS[dtype]:g}")


def share_of(runs: Sequence[Small], share: tuple[int, int]) -> Sequence[Small]:
    """Return the i-th of n shares of the runs, i from 1 on: every n-th, as those beside each other take as long."""
    i, n = share
    return runs[i - 1 :: n]


def read_share(context: click.Context, parameter: click.Parameter, text: str) -> tuple[int, int]:
    """Read I/N."""
    match, most = re.fullmatch(r"(\d+)/(\d+)", text), len(small_runs())
    i, n = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= i <= n <= most:
        raise click.BadParameter(f"{text!r} is no share; give I/N, such as 1/3, with I from 1 to N and N up to {most}.")
    return i, n


@click.command()
@click.option("--share", metavar="I/N", default="1/1", callback=read_share, help="The I-th of N shares of the runs.")
def main(share: tuple[int, int]) -> None:
    """Launch every kernel on small inputs and compare with the reference."""
    check_gpu()
    cupy.cuda.set_allocator(None)  # every array on its own, so that reads past its end are seen
    results = [run_small(run) for run in share_of(small_runs(), share)]
    launched = {name for _, names in results for name in names}
    missed = {file.stem for file in kernels.SOURCES.glob("*.cu")} - launched
    if share == (1, 1) and missed:
        raise SystemExit(f"the small case does not launch {', '.join(sorted(missed))}")
    click.echo(f"{len(results)} small runs of {len(launched)} kernels, errors at most "
               f"{max(share for share, _ in results):.0%} of their bars")  # fmt: skip


if __name__ == "__main__":
    main()
