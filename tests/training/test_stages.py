"""Stages laid out over a run, as a function of the settings alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.errors import UserError
from zoo.registry import make
from zoo.training.settings import RunSettings


def settings(**values) -> RunSettings:
    return make(RunSettings, values, "train")


def test_berts_stages():
    """Devlin et al. 2018, A.2: a million steps, nine of ten on 128 tokens, the rest on 512."""
    task = dict(max_length=128, max_predictions=20)
    for steps, shares in ((None, (900_000, 100_000)), (1_000_000, (900_000, 100_000)), (1_000_000, (0.9, 0.1))):
        stages = (dict(steps=shares[0], task=task), dict(steps=shares[1], batch_size=64, accumulation=4))
        first, second = settings(steps=steps, batch_size=256, stages=stages).plan(num_examples=1)
        assert first == (0, 900_000, 0, 256, 1, task)
        assert second == (900_000, 1_000_000, 900_000 * 256, 64, 4, {})


def test_a_run_without_stages_is_one():
    assert settings(steps=7, batch_size=8, accumulation=2).plan(num_examples=3) == ((0, 7, 0, 8, 2, {}),)
    assert settings(epochs=2.5, batch_size=8).plan(num_examples=16)[0].last_step == 5


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(20, 10_000))
def test_every_step_belongs_to_one_stage_whatever_the_shares(parts, steps):
    shares = [part / sum(parts) for part in parts]
    stages = tuple(dict(steps=share, batch_size=2 + k) for k, share in enumerate(shares))
    try:
        laid_out = settings(steps=steps, stages=stages).plan(num_examples=1)
    except UserError as error:
        assert "less than one" in str(error) and min(shares) * steps < 1.5
        return
    seen = end = 0
    for stage, share in zip(laid_out, shares, strict=True):
        assert (stage.first_step, stage.first_example) == (end, seen)
        assert abs(stage.last_step - stage.first_step - share * steps) <= 1
        end, seen = stage.last_step, seen + (stage.last_step - stage.first_step) * stage.batch_size
    assert end == steps


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(stages=({},)), r"train.stages\[0\] needs steps"),
        (dict(epochs=1.0, stages=(dict(steps=3),)), "stages are counted in steps: .*instead of epochs=1.0"),
        (dict(steps=10, stages=(dict(steps=3), dict(steps=6))), r"add up to 9 \(3 \+ 6\), but train.steps is 10"),
        (dict(steps=10, stages=(dict(steps=0.5), dict(steps=0.4))), r"add up to 0.9, not to 1: 0.5 \+ 0.4"),
        (dict(stages=(dict(steps=0.5), dict(steps=0.5))), "shares of train.steps, which is not given"),
        (dict(steps=10, stages=(dict(steps=0.5), dict(steps=5))), "all whole numbers or all shares"),
        (
            dict(steps=10, stages=(dict(steps=0.01), dict(steps=0.99))),
            r"stages\[0\]: 0.01 of 10 steps is less than one",
        ),
        (dict(stages=(dict(steps=-3),)), r"train.stages\[0\]: steps must be positive, not -3"),
        (dict(stages=(dict(steps=3, batch_size=0),)), r"stages\[0\]: batch_size must be positive"),
        (dict(stages=(dict(steps=3, batch_size=6, accumulation=4),)), "batch_size=6 is no multiple of accumulation=4"),
        (dict(stages=(dict(steps=3, max_length=8),)), r"stages\[0\] has no argument 'max_length'"),
        (dict(stages=(dict(steps=3, task=dict(name="masked_lm")),)), "not the task itself: leave task.name out"),
        (dict(stages=(dict(steps=3, task="masked_lm"),)), r"stages\[0\], argument 'task': expected"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_mistakes_are_named(values, message):
    with pytest.raises(UserError, match=message):
        settings(**values)
