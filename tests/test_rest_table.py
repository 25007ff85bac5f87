"""The simulation behind the rule on K's products with what rounding hidden states leaves over."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import rest_table
from click.testing import CliRunner

from cupy_attn import reference
from cupy_attn.accuracy import BARS, relative_l2
from cupy_attn.bench import random_layer


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("dtype", rest_table.DTYPES)
def test_the_simulation_is_of_the_layer(dtype, rest):
    config = rest_table.CONFIG
    weights = dataclasses.replace(random_layer(config).astype(dtype), losses={})
    x = np.random.default_rng(0).standard_normal((1, 9, config.hidden_size), np.float32).astype(weights.dtype)
    y = rest_table.simulate(config, weights, x, rest=rest, folded=rest_table.taken(dtype, rest=rest))
    error = relative_l2(y, reference.forward(config, weights, x)[0])
    assert BARS[dtype] / 100 < error <= BARS[dtype]


def test_the_table_says_what_the_rest_is_good_for():
    result = CliRunner().invoke(rest_table.main, ["--past", "30", "--new", "60", "--draws", "1"])
    assert result.exit_code == 0, result.output
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.output.splitlines()[2:]]
    assert [row[:2] for row in rows] == [[dtype, name] for dtype in rest_table.DTYPES for name in rest_table.CASES]
    assert [row[-1] for row in rows] == ["no", "no", "yes", "yes", "yes"] * 2
    for row in rows:
        with_rest, without = (float(cell.split(",")[0]) for cell in row[4:6])
        assert 0 < with_rest < without or row[-1] == "no"


def test_the_table_says_what_weights_with_the_norm_in_them_cost():
    result = CliRunner().invoke(rest_table.main, ["--folded", "--past", "30", "--new", "8", "--draws", "2"])
    assert result.exit_code == 0, result.output
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.output.splitlines()[2:]]
    assert [row[0] for row in rows] == [dtype for dtype in rest_table.DTYPES for _ in rest_table.CASES]
    for row in rows:
        as_it_is, folded = (float(cell.split(",")[0]) for cell in row[4:6])
        assert 0 < as_it_is < folded
