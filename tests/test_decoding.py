"""Decoding of planted codes and of noise, against float64 least squares."""

import numpy as np
import pytest
import xarray as xr
from sklearn.linear_model import Ridge

from metadyn import decoding

RNG = np.random.default_rng(0)


def samples(*shape):
    return RNG.standard_normal(shape)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_planted_linear_code_is_decoded_exactly(scale):
    x, code = samples(2, 80, 3, 6), scale * samples(6, 4)
    errors = decoding.held_out(x, x @ code + 5.0)
    assert errors.left.shape == errors.total.shape == (2, 40, 3)
    np.testing.assert_allclose(decoding.r_squared(errors).value, 1.0, atol=1e-9)


def test_nothing_is_found_in_noise_or_in_other_tasks():
    x, y = samples(2, 400, 3, 50), samples(2, 400, 3, 4)
    for target in (y, decoding.shuffled(x[..., :4])):
        r_squared = decoding.r_squared(decoding.held_out(x, target))
        assert np.all(np.abs(r_squared.value) < 0.05)
        assert np.all(r_squared.low < 0.02)
    overfitted = np.linalg.lstsq(x[0, ::2, 0], y[0, ::2, 0])[0]  # which the penalty prevents
    left = ((y[0, 1::2, 0] - x[0, 1::2, 0] @ overfitted) ** 2).mean()
    assert left > 1.15 * (y[0, 1::2, 0] ** 2).mean()


def test_a_code_under_noise_is_decoded_as_far_as_least_squares_can():
    x = samples(1, 4000, 1, 5)
    y = x @ samples(5, 2) + samples(1, 4000, 1, 2)
    errors = decoding.held_out(x, y)
    fit, new = slice(0, None, 2), slice(1, None, 2)
    design = lambda which: np.concatenate([x[0, which, 0], np.ones((2000, 1))], 1)
    weights = np.linalg.lstsq(design(fit), y[0, fit, 0])[0]
    left = ((y[0, new, 0] - design(new) @ weights) ** 2).sum(-1)
    np.testing.assert_allclose(errors.left[0, :, 0].mean(), left.mean(), rtol=1e-3)
    total = ((y[0, new, 0] - y[0, fit, 0].mean(0)) ** 2).sum(-1)
    np.testing.assert_allclose(errors.total[0, :, 0], total)
    value = decoding.explained(*(part.mean((0, 1)) for part in errors))
    np.testing.assert_allclose(decoding.r_squared(errors).value, value)


def test_ridge_is_that_of_scikit_learn_at_the_penalty_it_chooses():
    x, y, new = samples(2, 60, 30), samples(2, 60, 3), samples(2, 10, 30)
    predictions = decoding.ridge(x, y, new)
    for i, prediction in enumerate(predictions):
        mean, spread = x[i].mean(0), x[i].std(0)
        candidates = [
            Ridge(60 * penalty).fit((x[i] - mean) / spread, y[i]) for penalty in decoding.PENALTIES
        ]
        expected = [fit.predict((new[i] - mean) / spread) for fit in candidates]
        assert min(np.abs(prediction - other).max() for other in expected) < 1e-9


def test_a_penalty_is_chosen_even_for_more_numbers_than_tasks():
    """Where the fit can be exact, the least penalty predicts noise worse than the mean does."""
    x = samples(2, 64, 1, 64)
    noise = decoding.r_squared(decoding.held_out(x, samples(2, 64, 1, 4)))
    assert noise.value.item() > -0.2
    planted = x @ samples(64, 2)
    code = decoding.r_squared(decoding.held_out(x, planted + 0.5 * samples(2, 64, 1, 2)))
    assert code.value.item() > 0.2


def test_the_share_decoded_does_not_depend_on_the_units_of_bayes_numbers():
    state = samples(2, 60, 3, 5)
    beliefs = {"mean": state[..., :3], "uncertainty": samples(2, 60, 3, 1) + 7.0}
    shares = []
    for unit in (1.0, 1e-3, 1e3):
        numbers = {"state": state, **beliefs, "uncertainty": unit * beliefs["uncertainty"]}
        numbers |= {"covariance": np.full((2, 60, 3, 2), 3.0), "query": samples(2, 60, 3, 1)}
        data = {
            name: (
                ("seed", "task", "step", name + "_0"),
                np.pad(array, [(0, 0)] * 2 + [(1, 0), (0, 0)]),
            )
            for name, array in numbers.items()
        }
        forth, _ = decoding.both_ways(xr.Dataset(data))
        shares.append(decoding.r_squared(forth).value)
    np.testing.assert_allclose(shares[1:], [shares[0]] * 2, rtol=1e-6)
    np.testing.assert_allclose(shares[0], 0.75, atol=0.1)  # the state has three of the four numbers


def test_a_constant_number_in_a_state_changes_nothing():
    x, y = samples(1, 60, 1, 4), samples(1, 60, 1, 2)
    constant = np.concatenate([x, np.full_like(x, 3.0)], -1)
    for plain, padded in zip(decoding.held_out(x, y), decoding.held_out(constant, y), strict=True):
        np.testing.assert_allclose(plain, padded, rtol=1e-6)


def test_a_number_that_hardly_varies_in_the_fit_does_no_harm_where_it_varies():
    """A saturated unit, say, moves by 1e-6 on the tasks of the fit, and by 0.1 on another."""
    rng = np.random.default_rng(0)
    x, new = rng.normal(size=(2, 200, 5))
    y, expected = (states[:, :1] + rng.normal(0, 0.1, size=(200, 1)) for states in (x, new))
    x[:, 4], new[:, 4] = rng.normal(0, 1e-6, size=(2, 200))
    new[0, 4] = 0.1
    left = ((decoding.ridge(x, y, new) - expected) ** 2).sum()
    assert 1 - left / (expected**2).sum() > 0.95


def test_an_mlp_decodes_nonlinear_codes_and_loses_no_linear_one():
    x = samples(1, 1200, 1, 3)
    square = x[..., :1] ** 2
    linear, nonlinear = (
        decoding.r_squared(decoding.held_out(x, square, decode)).value
        for decode in (decoding.ridge, decoding.mlp)
    )
    assert abs(linear[0]) < 0.05
    assert nonlinear[0] > 0.8
    linear_code = decoding.held_out(x, x @ samples(3, 2), decoding.mlp)
    np.testing.assert_allclose(decoding.r_squared(linear_code).value, 1.0, atol=1e-3)
    noise = decoding.held_out(x, samples(1, 1200, 1, 2), decoding.mlp)
    assert abs(decoding.r_squared(noise).value[0]) < 0.1


def test_delay_counts_doublings_of_the_outer_step():
    steps = np.array([0, 1, 3, 7, 15, 31])  # log2(1 + step) = 0 … 5
    later = np.array([0.1, 0.1, 0.1, 0.5, 0.9, 0.9])  # half-way at 3
    sooner = np.exp(-np.array([0.0, 1.0, 2.0, 2.0, 2.0, 2.0]))  # half-way at 1
    np.testing.assert_allclose(decoding.delay(steps, later, sooner), 2.0)
    delays = decoding.delay(steps, np.stack([later, later]), np.stack([sooner, sooner]))
    np.testing.assert_allclose(delays, [2.0, 2.0])


def test_with_nothing_to_explain_there_is_no_r_squared():
    errors = decoding.held_out(samples(1, 20, 1, 2), np.ones((1, 20, 1, 1)))
    assert np.isnan(decoding.explained(*(part.mean((0, 1)) for part in errors))).all()
