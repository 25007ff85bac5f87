"""Whether the heads of a layer attend sensibly: scores, entropy, attention sink, and what has gone wrong.

A row is one query's softmax over the T keys it sees. Its entropy is -sum p ln p, at most ln T. A row that sees one key
gives it all its weight whatever the scores, so it counts neither as collapsed or one-hot nor as uniform.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from .accuracy import collapsed_key, is_one_hot, is_uniform
from .config import AttentionConfig
from .errors import InputError
from .ops import apply_rope, qk_norm
from .rope import rope_angles
from .weights import AttentionWeights

NOT_FINITE, COLLAPSED, ONE_HOT, UNIFORM, DEAD = FLAGS = ("NaN or Inf", "collapsed", "one-hot", "uniform", "dead")
DEAD_OUTPUT = 1e-6  # of the layer's largest |attention|: a head below it is gone in the output's rounding
BLOCK_SCORES = 1 << 21  # scores held at a time: 16 MB in float64, and some temporaries of that size
SOURCES = (("q_rope", "k_rope"), ("q_norm", "k_norm"), ("q", "k"))


@dataclasses.dataclass(frozen=True)
class Rows:
    """Measures of every row of softmax, each [B, Hq, S].

    ``keys`` int64 counts the keys a row sees. ``smallest``, ``largest`` and ``lse`` (ln sum exp) float64 are of its
    scores, NaN where only probabilities are known. ``entropy`` float64 is in nats. ``top_key`` int64 is the index of
    the key with most weight, ``top_weight`` float64 that weight; ``first_weight`` is that of key 0, NaN where the row
    does not see it. ``finite`` bool says whether all that is known of the row is a number.
    """

    keys: np.ndarray
    smallest: np.ndarray
    largest: np.ndarray
    lse: np.ndarray
    entropy: np.ndarray
    top_key: np.ndarray
    top_weight: np.ndarray
    first_weight: np.ndarray
    finite: np.ndarray

    @property
    def relative_entropy(self) -> np.ndarray:
        """Entropy over ln(keys), 0 to 1, [B, Hq, S]; NaN where a row sees one key or is not finite."""
        most = np.log(np.where(self.keys > 1, self.keys, np.nan))
        return np.where(self.finite, self.entropy / most, np.nan)


@dataclasses.dataclass(frozen=True)
class HeadHealth:
    """One head over all rows that are finite; a measure is NaN if no row or no stage gives it.

    ``min_score`` and ``max_score`` are of the scores that are not masked. ``relative_entropy`` and ``first_key``, the
    share of the weight on the first key (an attention sink), are means over the rows that see more than one key, the
    second of those that see the first. ``flags`` are some of ``FLAGS``.
    """

    head: int
    min_score: float
    max_score: float
    relative_entropy: float
    first_key: float
    flags: tuple[str, ...]


def rotated(
    stages: Mapping[str, np.ndarray], config: AttentionConfig, weights: AttentionWeights, positions: np.ndarray
) -> tuple[str, np.ndarray, np.ndarray] | None:
    """Return queries and keys as they are multiplied, from the latest stages that give them.

    Parameters
    ----------
    stages : mapping of str to ndarray
        By the names of ``reference.STAGES``.
    config, weights : AttentionConfig, AttentionWeights
        Of the layer: norms and angles for what is not rotated yet.
    positions : ndarray [B, S] of int
        Of the tokens.

    Returns
    -------
    source : str
        The stages they are from.
    q, k : ndarray [B, S, Hq, D], [B, S, Hkv, D] float64
        Normalised and rotated. None, instead of the three, if no pair of stages is there.
    """
    pair = next((pair for pair in SOURCES if all(name in stages for name in pair)), None)
    if pair is None:
        return None
    q, k = (stages[name].astype(np.float64) for name in pair)
    if pair == ("q", "k"):
        q, k = qk_norm(q, k, weights.q_norm, weights.k_norm, config.rms_norm_eps)
    if pair != ("q_rope", "k_rope"):
        # Dynamic frequencies depend on the longest position of each sequence, its own only.
        angles = [rope_angles(config, row, int(row.max()) + 1) for row in positions]
        cos, sin = (np.stack(parts) for parts in zip(*angles, strict=True))
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    return " and ".join(pair), q, k


def measure_rows(
    positions: np.ndarray,
    window: int | None,
    *,
    qk: tuple[np.ndarray, np.ndarray] | None = None,
    scores: np.ndarray | None = None,
    probs: np.ndarray | None = None,
) -> Rows:
    """Measure every row of softmax of a layer in float64, some rows of one head at a time.

    Parameters
    ----------
    positions : ndarray [B, S] of int
        Of the tokens: who sees whom.
    window : int or None
        How many positions back a query sees, itself included; None: all.
    qk : (q, k), ndarrays [B, S, Hq, D] and [B, S, Hkv, D], optional
        Normalised and rotated: scores are ``q k^T / sqrt(D)``.
    scores : ndarray [B, Hq, S, S], optional
        Instead of those of ``qk``; what a query does not see is left out whatever it holds.
    probs : ndarray [B, Hq, S, S], optional
        Instead of the softmax of the scores; each row is divided by its sum, which rounding may have moved from 1.

    Raises
    ------
    ValueError
        None of ``qk``, ``scores`` and ``probs`` is given.
    """
    if probs is not None:
        heads = probs.shape[1]
    elif scores is not None:
        heads = scores.shape[1]
    elif qk is not None:
        heads = qk[0].shape[2]
    else:
        raise ValueError("no qk, no scores and no probs; give one of them.")
    batch, seq = positions.shape
    step = max(1, BLOCK_SCORES // (batch * seq))
    blocks = []
    for start in range(0, seq, step):
        rows = slice(start, start + step)
        distance = positions[:, rows, None] - positions[:, None, :]
        seen = (distance >= 0) & (distance < (window or np.inf))
        by_head = []
        for head in range(heads):
            s = None
            if scores is not None:
                s = scores[:, head, rows].astype(np.float64)
            elif qk is not None:
                q, k = qk
                keys = k[:, :, head // (heads // k.shape[2])].astype(np.float64)
                with np.errstate(invalid="ignore"):  # NaN and Inf are what is looked for
                    s = q[:, rows, head].astype(np.float64) @ keys.swapaxes(1, 2) / np.sqrt(q.shape[-1])
            by_head.append(_measure(seen, s, None if probs is None else probs[:, head, rows].astype(np.float64)))
        blocks.append({name: np.stack([m[name] for m in by_head], axis=1) for name in by_head[0]})
    return Rows(**{name: np.concatenate([block[name] for block in blocks], axis=2) for name in blocks[0]})


def _measure(seen: np.ndarray, scores: np.ndarray | None, probs: np.ndarray | None) -> dict[str, np.ndarray]:
    """Return the measures of ``Rows`` for rows [B, R, S] of one head, each [B, R]."""
    smallest = largest = lse = np.full(seen.shape[:2], np.nan)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):  # NaN and Inf are what is looked for
        if scores is not None:
            smallest, largest = np.where(seen, scores, np.inf).min(-1), np.where(seen, scores, -np.inf).max(-1)
            shifted = np.where(seen, scores - largest[..., None], -np.inf)
            log_total = np.log(np.exp(shifted).sum(-1))
            lse, log_p = largest + log_total, shifted - log_total[..., None]
        if probs is not None:
            p = np.where(seen, probs, 0.0)
            log_p = np.log(p / p.sum(-1, keepdims=True))
        p = np.exp(log_p)
        entropy = -np.where(p == 0, 0.0, p * log_p).sum(-1)
    finite = np.isfinite(entropy) & (np.isfinite(smallest) & np.isfinite(largest) | (scores is None))
    return {
        "keys": seen.sum(-1), "smallest": smallest, "largest": largest, "lse": lse, "entropy": entropy,
        "top_key": p.argmax(-1), "top_weight": p.max(-1), "first_weight": np.where(seen[..., 0], p[..., 0], np.nan),
        "finite": finite,
    }  # fmt: skip


def measure_dump(
    stages: Mapping[str, np.ndarray], config: AttentionConfig, weights: AttentionWeights, positions: np.ndarray
) -> tuple[str, Rows]:
    """Measure the rows of a dump: its own ``probs`` and ``scores``, recomputed where it does not hold them.

    Parameters
    ----------
    stages : mapping of str to ndarray
        By the names of ``reference.STAGES``, in their shapes.
    config, weights : AttentionConfig, AttentionWeights
        Of the layer.
    positions : ndarray [B, S] of int
        Of the tokens.

    Returns
    -------
    source : str
        The stages that the probabilities are from.
    rows : Rows

    Raises
    ------
    InputError
        The dump holds no stage that gives probabilities.
    """
    scores, probs = stages.get("scores"), stages.get("probs")
    found = rotated(stages, config, weights, positions) if scores is None else None
    if found is None and scores is None and probs is None:
        held = ", ".join(stages) or "no stages"
        raise InputError(
            f"the dump holds {held}; attention health needs probs or scores, or q_rope and k_rope, q_norm and k_norm, "
            "or q and k: dump it again with those."
        )
    source = "probs" if probs is not None else "scores" if scores is not None else found[0] if found else ""
    qk = None if found is None else found[1:]
    return source, measure_rows(positions, config.window(weights.layer), qk=qk, scores=scores, probs=probs)


def head_health(rows: Rows, attention: np.ndarray | None = None) -> list[HeadHealth]:
    """Sum up each head.

    Parameters
    ----------
    rows : Rows
        Of the layer.
    attention : ndarray [B, S, Hq, D], optional
        What the heads give out: one that is zero is dead, one that is no number is flagged so.
    """
    output = None
    if attention is not None:
        output = np.abs(attention.astype(np.float64)).max(axis=(0, 1, 3))  # [Hq]; NaN and Inf stay
        largest = np.where(np.isfinite(output), output, 0.0).max()
    finite, entropy = rows.finite, rows.relative_entropy
    found = []
    for h in range(entropy.shape[1]):
        good, telling = finite[:, h], np.isfinite(entropy[:, h])
        flags = []
        if not good.all() or (output is not None and not np.isfinite(output[h])):
            flags.append(NOT_FINITE)
        if collapsed_key(rows.top_key[:, h][telling], rows.top_weight[:, h][telling]) is not None:
            flags.append(COLLAPSED)
        elif is_one_hot(rows.top_weight[:, h][telling]):
            flags.append(ONE_HOT)
        if is_uniform(entropy[:, h][telling]):
            flags.append(UNIFORM)
        if output is not None and output[h] <= DEAD_OUTPUT * largest:
            flags.append(DEAD)
        found.append(HeadHealth(
            head=h,
            min_score=float(rows.smallest[:, h][good].min()) if good.any() else np.nan,
            max_score=float(rows.largest[:, h][good].max()) if good.any() else np.nan,
            relative_entropy=_mean(entropy[:, h]),
            first_key=_mean(rows.first_weight[:, h][telling]),
            flags=tuple(flags),
        ))  # fmt: skip
    return found


def _mean(values: np.ndarray) -> float:
    """Return the mean of what is not NaN; NaN of nothing."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else np.nan


def summary(heads: Sequence[HeadHealth]) -> str:
    """Return a sentence: how many heads are healthy, and which have which flag."""
    healthy = sum(not head.flags for head in heads)
    parts = [f"{healthy} of {len(heads)} heads {'is' if healthy == 1 else 'are'} healthy"]
    for flag in FLAGS:
        flagged = [str(head.head) for head in heads if flag in head.flags]
        if flagged:
            parts.append(f"{flag}: {'heads' if len(flagged) > 1 else 'head'} {', '.join(flagged)}")
    return "; ".join(parts) + "."
