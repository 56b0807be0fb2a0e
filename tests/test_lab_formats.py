"""Stage 05's measuring tools: formats, round trips, and what changed tokens do to a model."""

from __future__ import annotations

import numpy as np
import pytest

from flashmla.lab import formats, text, training
from flashmla.reference import fp8

QUICK = training.Recipe(steps=3, batch=2, context=48, warm_up=1)


@pytest.fixture(scope="module")
def model():
    return training.train(recipe=QUICK)


@pytest.fixture(scope="module")
def seen(model):
    return model.activations(text.held_out(40))


def test_formats_say_what_their_standards_say():
    e4m3, e5m2, int8 = (formats.positive_values(name) for name in ("e4m3", "e5m2", "int8"))
    assert (len(e4m3), e4m3[0], e4m3[-1]) == (126, 2**-9, 448)
    assert (len(e5m2), e5m2[0], e5m2[-1]) == (123, 2**-16, 57344)
    assert int8.tolist() == list(range(1, 128))
    for name, (_, largest) in formats.FORMATS.items():
        assert formats.positive_values(name)[-1] == largest


@pytest.mark.parametrize("spread", [1.0, 1e3])
def test_round_trip_is_the_oracle_s(spread):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(5, 512)) * spread ** rng.normal(size=(5, 512))).astype(np.float32)
    assert np.array_equal(formats.round_trip(x, 128), fp8.dequantise(*fp8.quantise(x)))


def test_int8_is_off_by_half_a_step_at_most():
    x = np.linspace(-100, 100, 256, dtype=np.float32)
    error = np.abs(formats.round_trip(x, 128, "int8") - x)
    assert 0.4 < error.max() <= 0.5  # 100 / 127 rounds up to a scale of 1
    assert np.array_equal(formats.round_trip(x, 256, "int8"), np.rint(x))


def test_parts_are_rounded_and_the_rest_is_left_alone(seen):
    kv = seen.kv.numpy()
    for nope, rope in ((True, False), (False, True), (True, True), (False, False)):
        got = formats.round_parts(kv, nope, rope)
        assert np.array_equal(got[:, :512], kv[:, :512]) is not nope
        assert np.array_equal(got[:, 512:], kv[:, 512:]) is not rope


def test_relative_error_counts_the_places_it_is_given():
    exact, got = np.array([3.0, 4.0, 100.0]), np.array([3.0, 4.5, 0.0])
    assert formats.relative_error(got, exact, [0, 1]) == pytest.approx(0.1)
    assert formats.relative_error(exact, exact) == 0


def test_score_error_is_that_of_the_scores(seen):
    rng = np.random.default_rng(1)
    kv = seen.kv.numpy() + rng.normal(size=(40, 576)).astype(np.float32)
    past = np.tril(np.ones((40, 40), bool))

    def scores(tokens, columns):
        q = seen.q_absorbed.numpy()[..., columns]
        return np.einsum("ihc,jc->hij", q, tokens[:, columns])[:, past] * seen.softmax_scale

    for columns in (slice(None), slice(512, 576)):
        moved = scores(kv, columns) - scores(seen.kv.numpy(), columns)
        want = np.sqrt(np.mean(moved**2))
        assert formats.score_error(seen, kv, columns) == pytest.approx(want, rel=1e-4)


def test_products_that_count_are_between_one_and_all(seen):
    assert 1 < formats.products_that_count(seen, slice(512, 576)) < 64
    assert formats.products_that_count(seen, slice(7, 8)) == pytest.approx(1)


def test_divergence_is_nothing_for_an_exact_cache_and_grows_with_the_error(model):
    tokens = text.held_out(48).view(2, 24)

    def noise(size):
        rng = np.random.default_rng(0)
        return lambda kv: kv + size * rng.normal(size=kv.shape).astype(np.float32)

    assert formats.divergence(model, tokens, lambda kv: kv) == 0
    small, large = (formats.divergence(model, tokens, noise(size)) for size in (0.1, 1.0))
    assert 0 < 10 * small < large
