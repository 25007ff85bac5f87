"""Error measures that cannot be fooled by NaN or zero, and collapse checks that find what they name."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import make_config, make_hidden, make_weights

import cupy_attn as ca
from cupy_attn import reference
from cupy_attn.accuracy import BARS, MAX_ERROR_BARS, compare_stages, max_error, relative_l2, relative_l2_along

INF = float("inf")


def test_relative_l2():
    assert relative_l2(np.array([3.0, 4.0]), np.array([3.0, 4.0])) == 0
    assert relative_l2(np.array([3.0, 5.0]), np.array([3.0, 4.0])) == pytest.approx(1 / 5)
    assert relative_l2(np.array([[6.0, 8.0]]), np.array([[3.0, 4.0]])) == pytest.approx(1)


def test_relative_l2_along_an_axis_is_that_of_each_slice():
    expected = np.array([[[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0], [np.nan, 0.0]]])
    actual = expected + np.array([1.0, 0.0, 0.0])[:, None]
    assert relative_l2_along(actual, expected, 1).tolist() == [pytest.approx(2 / 5), 0, INF]
    assert relative_l2_along(actual[0], expected[0], 0).tolist() == [pytest.approx(2**0.5 / 5), 0, 0]


def test_max_error():
    assert max_error(np.array([3.0, -4.0]), np.array([3.0, -4.0])) == 0
    assert max_error(np.array([1.0, -4.5, 0.25]), np.array([1.0, -4.0, 0.0])) == pytest.approx(0.5 / 4)


@pytest.mark.parametrize("measure", [relative_l2, max_error])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_is_infinitely_wrong(measure, bad):
    good, spoilt = np.ones((2, 3), np.float32), np.ones((2, 3), np.float32)
    spoilt[1, 1] = bad
    assert measure(spoilt, good) == INF
    assert measure(good, spoilt) == INF
    assert measure(spoilt, spoilt) == INF


@pytest.mark.parametrize("measure", [relative_l2, max_error])
def test_zero_and_nothing(measure):
    zero, one = np.zeros(3), np.ones(3)
    assert measure(zero, zero) == 0
    assert measure(one, zero) == INF
    assert measure(zero, one) == pytest.approx(1)
    assert measure(np.ones((0, 3)), np.ones((0, 3))) == 0


@pytest.mark.parametrize("measure", [relative_l2, max_error])
def test_shapes_are_never_broadcast(measure):
    with pytest.raises(ca.InputError, match=r"shapes differ: \(2, 3\) and \(3,\)"):
        measure(np.ones((2, 3)), np.ones(3))


def test_measures_are_taken_in_float64():
    """1e300 squared does not exist, nor does float16's 60000; both are measured."""
    x = np.full(4, 6e4, np.float16)
    assert relative_l2(x * np.float16(0.5), x) == 0.5
    assert relative_l2(np.float32(1) + np.float32(2**-23), np.float32(1)) == 2.0**-23


def test_bars_are_those_of_the_design():
    assert BARS["float16"] == 1e-3
    assert BARS["bfloat16"] == 3e-3
    assert MAX_ERROR_BARS["float16"] == 1e-3
    assert BARS["float32"] < 1e-4


def test_compare_stages_goes_in_order_and_marks_what_misses():
    expected = {"a": np.ones(4), "b": np.ones(4), "c": np.ones(4), "d": np.ones((0, 2))}
    actual = {"d": np.ones((0, 2)), "c": np.array([1, 1, 1, np.nan]), "a": np.array([1, 1, 1, 1.1]), "x": np.ones(2)}
    rows = compare_stages(actual, expected, bar=0.01)
    assert [row.stage for row in rows] == ["a", "c", "d"]
    a, c, d = rows
    assert (a.max_abs, a.relative_l2) == (pytest.approx(0.1), pytest.approx(0.05))
    assert (c.max_abs, c.relative_l2) == (INF, INF)
    assert (d.max_abs, d.relative_l2) == (0, 0)
    assert [row.passed for row in rows] == [False, False, True]
    assert compare_stages(actual, expected, bar=0.06)[0].passed


def test_compare_stages_refuses_unlike_shapes():
    with pytest.raises(ValueError, match="shapes differ"):
        compare_stages({"a": np.ones(3)}, {"a": np.ones(4)}, bar=1)


# Collapse.


def healthy_stages(**changes) -> dict[str, np.ndarray]:
    config = make_config()
    weights = make_weights(config, k_norm_max=96.5)
    return dict(reference.forward(config, weights, make_hidden(config, 2, 24))[1]) | changes


def test_a_healthy_layer_at_extreme_weights_has_no_finding():
    assert ca.check_collapse(healthy_stages()) == []


def test_a_healthy_layer_has_no_finding_in_its_own_stages():
    config = make_config()
    stages = {}
    layer = ca.Attention(config, make_weights(config, k_norm_max=96.5), "float32", "cpu")
    layer(make_hidden(config, 2, 24), stages=stages)
    assert ca.check_collapse(stages) == []


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("stage", ["q_norm", "probs", "scores", "output"])
def test_nan_and_inf_are_found_and_counted(stage, bad):
    stages = healthy_stages()
    broken = stages[stage].copy()
    broken[0, 0, 0] = bad
    count = broken[0, 0, 0].size
    found = ca.check_collapse(stages | {stage: broken})
    assert found == [f"{stage}: {count} of {broken.size} values are NaN or Inf."]


def test_minus_infinity_is_a_finding_except_in_masked_scores():
    stages = healthy_stages()
    assert np.isneginf(stages["scores"]).any()
    broken = stages["row_max"].copy()
    broken[0, 0, 0] = -np.inf
    assert ca.check_collapse(stages | {"row_max": broken}) == [f"row_max: 1 of {broken.size} values are NaN or Inf."]


def test_a_dead_head_is_found():
    stages = healthy_stages()
    attention = stages["attention"].copy()
    attention[:, :, 2] = 0
    assert ca.check_collapse(stages | {"attention": attention}) == ["attention: head 2 is zero for every token."]


def test_equal_outputs_are_found():
    stages = healthy_stages()
    output = np.broadcast_to(stages["output"][:1, :1], stages["output"].shape)
    assert ca.check_collapse(stages | {"output": output}) == ["output: all 48 tokens have the same output."]


def test_one_token_is_not_the_same_for_all():
    config = make_config()
    _, stages = reference.forward(config, make_weights(config), make_hidden(config, 1, 1))
    assert ca.check_collapse(stages) == []


def one_key(stages, head: int, key: int, share: float) -> dict[str, np.ndarray]:
    """Return stages whose head gives one key a share of every row that sees it, the rest in equal parts."""
    probs = stages["probs"].copy()
    for query in range(key, probs.shape[2]):
        others = query  # keys 0 .. query but one
        probs[:, head, query, : query + 1] = (1 - share) / max(others, 1)
        probs[:, head, query, key] = share if others else 1
    return stages | {"probs": probs}


def test_a_head_on_a_single_key_is_found():
    found = ca.check_collapse(one_key(healthy_stages(), head=1, key=0, share=0.995))
    assert len(found) == 1
    assert found[0].startswith("probs: head 1 gives key 0 more than 0.99 of the weight in 100%")


def test_a_head_on_exactly_one_key_is_found():
    """Probabilities that underflow to zero are the worst collapse, not a row that sees a single key."""
    found = ca.check_collapse(one_key(healthy_stages(), head=1, key=0, share=1.0))
    assert len(found) == 1
    assert found[0].startswith("probs: head 1 gives key 0")


def test_a_head_on_most_of_a_key_is_not_collapsed():
    assert ca.check_collapse(one_key(healthy_stages(), head=1, key=0, share=0.95)) == []


def test_a_head_that_looks_at_itself_is_not_collapsed():
    """Each row has one key, but never the same."""
    stages = healthy_stages()
    probs = stages["probs"].copy()
    probs[:, 0] = np.eye(probs.shape[-1]) * (1 - 1e-9) + np.where(probs[:, 0] > 0, 1e-9 / probs.shape[-1], 0)
    assert ca.check_collapse(stages | {"probs": probs}) == []


def test_a_uniform_head_is_found():
    stages = healthy_stages()
    probs = stages["probs"].copy()
    seen = np.isfinite(stages["scores"][:, 3])
    probs[:, 3] = seen / seen.sum(-1, keepdims=True)
    found = ca.check_collapse(stages | {"probs": probs})
    assert found == ["probs: head 3 is uniform over the keys it sees in nearly all rows."]


def test_zero_queries_make_every_head_uniform():
    config = make_config()
    weights = make_weights(config)
    tensors = weights.to_dict(config, prefix="")
    tensors["self_attn.q_norm.weight"] = np.zeros_like(weights.q_norm)
    _, stages = reference.forward(config, ca.AttentionWeights.from_dict(tensors, config), make_hidden(config, 1, 24))
    assert [line.split(" is ")[0] for line in ca.check_collapse(stages)] == [f"probs: head {h}" for h in range(4)]


def test_a_few_rows_say_nothing_about_a_head():
    config = make_config()
    _, stages = reference.forward(config, make_weights(config), make_hidden(config, 1, 10))
    assert ca.check_collapse(one_key(stages, head=0, key=0, share=0.999)) == []
