"""Heads made by hand, of each kind, are found to be of that kind; measures are those of the reference's softmax."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from conftest import make_config, make_hidden, make_weights

from cupy_attn import health, reference
from cupy_attn.accuracy import collapsed_key
from cupy_attn.arrays import BFLOAT16
from cupy_attn.errors import InputError

SEQ = 41  # 40 rows see more than one key
POSITIONS = np.arange(SEQ)[None]
KEYS = np.arange(1, SEQ + 1)


def healthy() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((SEQ, SEQ))


def onto(key: int, rows: slice = slice(None), score: float = 20.0) -> np.ndarray:
    scores = np.zeros((SEQ, SEQ))
    scores[rows, key] = score
    return scores


def sink(share: float) -> np.ndarray:
    """Return scores that give key 0 a share of the weight in every row, and the others the same each."""
    scores = np.zeros((SEQ, SEQ))
    scores[1:, 0] = np.log(share / (1 - share) * (KEYS[1:] - 1))
    return scores


def broken(bad: float) -> np.ndarray:
    scores = healthy()
    scores[30, 7] = bad
    return scores


def measure(*heads: np.ndarray, **options) -> health.Rows:
    return health.measure_rows(POSITIONS, None, scores=np.stack(heads)[None], **options)


def entropy_of(p: np.ndarray) -> float:
    return float(-(p * np.log(p)).sum() / np.log(p.size))


def test_each_kind_of_head_is_told_from_the_others():
    attention = np.random.default_rng(1).standard_normal((1, SEQ, 6, 8)).astype(np.float32)
    attention[:, :, 5] *= 1e-9
    rows = measure(healthy(), onto(1), np.zeros((SEQ, SEQ)), sink(0.6), broken(np.nan), healthy())
    found = health.head_health(rows, attention)
    assert [head.head for head in found] == list(range(6))
    assert [head.flags for head in found] == [
        (), (health.COLLAPSED,), (health.UNIFORM,), (), (health.NOT_FINITE,), (health.DEAD,)
    ]  # fmt: skip
    assert health.summary(found) == (
        "2 of 6 heads are healthy; NaN or Inf: head 4; collapsed: head 1; uniform: head 2; dead: head 5."
    )
    assert health.summary(found[1:2] * 2) == "0 of 2 heads are healthy; collapsed: heads 1, 1."


def test_a_healthy_head_has_the_measures_of_its_softmax():
    scores = healthy()
    probs = [np.exp(scores[i, : i + 1]) / np.exp(scores[i, : i + 1]).sum() for i in range(SEQ)]
    (head,) = health.head_health(measure(scores))
    seen = scores[np.tril_indices(SEQ)]
    assert (head.min_score, head.max_score) == (seen.min(), seen.max())
    assert head.relative_entropy == pytest.approx(np.mean([entropy_of(p) for p in probs[1:]]), rel=1e-12)
    assert head.first_key == pytest.approx(np.mean([p[0] for p in probs[1:]]), rel=1e-12)


def test_a_collapsed_head_has_no_entropy_and_a_uniform_one_all():
    rows = measure(onto(1), np.zeros((SEQ, SEQ)))
    collapsed, uniform = health.head_health(rows)
    assert (collapsed.min_score, collapsed.max_score) == (0, 20)
    assert collapsed.relative_entropy < 1e-6
    assert collapsed.first_key == pytest.approx(np.exp(-20), rel=1e-3)
    assert (rows.top_key[0, 0, 1:] == 1).all()
    assert uniform.relative_entropy == pytest.approx(1, rel=1e-12)
    assert uniform.first_key == pytest.approx(np.mean(1 / KEYS[1:]), rel=1e-12)
    assert (uniform.min_score, uniform.max_score) == (0, 0)


def test_a_sink_takes_its_share_and_is_no_collapse():
    for share in (0.6, 0.98):
        (head,) = health.head_health(measure(sink(share)))
        assert head.first_key == pytest.approx(share, rel=1e-12)
        rest = [np.full(n - 1, (1 - share) / (n - 1)) for n in KEYS[1:]]
        assert head.relative_entropy == pytest.approx(np.mean([entropy_of(np.append(r, share)) for r in rest]))
        assert head.flags == ()
    assert health.head_health(measure(sink(0.999)))[0].flags == (health.COLLAPSED,)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_that_are_no_number_are_left_out_of_the_measures(bad):
    rows = measure(broken(bad), healthy())
    assert np.flatnonzero(~rows.finite[0, 0]).tolist() == [30]
    assert np.isnan(rows.relative_entropy[0, 0]).sum() == 2  # that row and the first, which sees one key
    sick, well = health.head_health(rows)
    assert sick.flags == (health.NOT_FINITE,)
    others = np.delete(rows.relative_entropy[0, 1], [0, 30])
    assert sick.relative_entropy == pytest.approx(others.mean(), rel=1e-12)
    assert -5 < sick.min_score < sick.max_score < 5
    assert well.flags == ()
    masked = healthy()
    masked[7, 30] = bad  # a key the row does not see
    assert health.head_health(measure(masked)) == [dataclasses.replace(well, head=0)]


def test_an_output_that_is_no_number_is_flagged_and_spares_the_others():
    attention = np.ones((1, SEQ, 3, 2))
    attention[0, 5, 0, 1], attention[:, :, 2] = np.nan, 1e-3
    flags = [head.flags for head in health.head_health(measure(*[healthy()] * 3), attention)]
    assert flags == [(health.NOT_FINITE,), (), ()]
    dead = health.head_health(measure(healthy()), np.zeros((1, SEQ, 1, 2)))
    assert dead[0].flags == (health.DEAD,)


def test_nearly_all_rows_are_19_of_20_or_more():
    assert health.head_health(measure(onto(1, slice(4, None))))[0].flags == ()  # 37 of 40 rows
    assert health.head_health(measure(onto(1, slice(3, None))))[0].flags == (health.COLLAPSED,)
    even = np.zeros((SEQ, SEQ))
    even[1:4, 0] = 5
    assert health.head_health(measure(even))[0].flags == ()
    even[3, 0] = 0
    assert health.head_health(measure(even))[0].flags == (health.UNIFORM,)


def test_one_key_of_nearly_all_rows_that_have_one_is_collapse():
    keys = np.zeros(400, int)
    keys[:19] = 7
    weights = np.ones(400)
    weights[-20:] = 0.5
    assert collapsed_key(keys, weights) == 0  # 361 of 380 of 400
    keys[19] = 7
    assert collapsed_key(keys, weights) is None


def test_a_head_on_one_key_a_row_is_one_hot_and_not_collapsed():
    (head,) = health.head_health(measure(20 * np.eye(SEQ)))
    assert head.flags == (health.ONE_HOT,)
    assert head.relative_entropy < 1e-5
    for first, flags in ((4, ()), (3, (health.ONE_HOT,))):  # 37 and 38 of 40 rows
        scores = 20 * np.eye(SEQ)
        scores[1:first] = 0
        assert health.head_health(measure(scores))[0].flags == flags


def test_scores_that_a_norm_blew_up_leave_no_head_healthy():
    config = make_config()
    weights = make_weights(config, k_norm_max=44.5)
    positions = np.arange(64)[None]
    _, stages = reference.forward(config, weights, make_hidden(config, 1, 64), positions=positions)
    for scale, flags in ((1.0, set()), (96.5, {health.ONE_HOT})):
        pair = {"q_rope": stages["q_rope"] * scale, "k_rope": stages["k_rope"]}
        found = health.head_health(health.measure_dump(pair, config, weights, positions)[1])
        assert {flag for head in found for flag in head.flags} == flags
        assert all(bool(head.flags) == bool(flags) for head in found)


@pytest.mark.parametrize(("window", "seq"), [(None, 1), (1, 9)])
def test_rows_that_see_one_key_say_nothing(window, seq):
    rows = health.measure_rows(np.arange(seq)[None], window, scores=np.ones((1, 1, seq, seq)))
    (head,) = health.head_health(rows)
    assert head.flags == ()
    assert (head.min_score, head.max_score) == (1, 1)
    assert np.isnan([head.relative_entropy, head.first_key]).all()


def test_probabilities_alone_have_no_scores_and_may_be_rounded():
    probs = np.tril(np.ones((SEQ, SEQ))) / KEYS[:, None]
    rows = health.measure_rows(POSITIONS, None, probs=probs[None, None].astype(BFLOAT16))
    (head,) = health.head_health(rows)
    assert head.flags == (health.UNIFORM,)
    assert head.relative_entropy == pytest.approx(1, rel=1e-9)
    assert np.isnan([head.min_score, head.max_score]).all()
    probs[20, 3] = np.nan
    assert health.head_health(health.measure_rows(POSITIONS, None, probs=probs[None, None]))[0].flags == (
        health.NOT_FINITE, health.UNIFORM,
    )  # fmt: skip
    with pytest.raises(ValueError, match="give one of them"):
        health.measure_rows(POSITIONS, None)


CONFIGS = {
    "default": {},
    "window": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    "dynamic": {"max_position_embeddings": 16, "rope_scaling": {"rope_type": "dynamic", "factor": 8.0}},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_dump_gives_the_same_measures_whatever_stages_it_holds(kind, monkeypatch):
    config = make_config(**CONFIGS[kind])
    weights = make_weights(config, k_norm_max=44.5)
    positions = np.stack([np.arange(23), np.arange(23) * 2 + 3])
    _, stages = reference.forward(config, weights, make_hidden(config, 2, 23), positions=positions)
    sources = [("probs", "scores"), ("scores",), *health.SOURCES]
    measured = []
    for names in sources:
        source, rows = health.measure_dump({n: stages[n] for n in names}, config, weights, positions)
        assert source in (" and ".join(names), "probs")
        measured.append(rows)
    probs, scores = stages["probs"], stages["scores"]
    for rows in measured:
        np.testing.assert_allclose(rows.lse, stages["lse"], rtol=1e-9)
        np.testing.assert_allclose(rows.largest, stages["row_max"], rtol=1e-9)
        np.testing.assert_array_equal(rows.keys, np.isfinite(scores).sum(-1))
        np.testing.assert_allclose(rows.entropy, -(probs * np.log(np.maximum(probs, 1e-300))).sum(-1), atol=1e-9)
        np.testing.assert_array_equal(rows.top_key, probs.argmax(-1))
        assert rows.finite.all()
    monkeypatch.setattr(health, "BLOCK_SCORES", 2 * 23 * 4)  # four rows at a time
    again = health.measure_dump(stages, config, weights, positions)[1]
    np.testing.assert_array_equal(again.entropy, measured[0].entropy)
    np.testing.assert_array_equal(again.first_weight, measured[0].first_weight)


def test_a_dump_without_the_stages_is_refused():
    config = make_config()
    weights = make_weights(config)
    stages = {"q": np.zeros((1, 3, 4, 32)), "k_rope": np.zeros((1, 3, 2, 32))}
    with pytest.raises(InputError, match=r"holds q, k_rope; attention health needs .* or q and k: dump it again"):
        health.measure_dump(stages, config, weights, np.arange(3)[None])
    with pytest.raises(InputError, match="the dump holds no stages;"):
        health.measure_dump({}, config, weights, np.arange(3)[None])
