import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vgm_peft.data import order
from vgm_peft.data.order import Order, batch_indices
from vgm_peft.errors import ConfigError

buckets = st.lists(st.integers(0, 4), min_size=1, max_size=40)
sizes = st.integers(1, 9)


@settings(max_examples=60)
@given(buckets, sizes, st.integers(0, 2**40), st.integers(1, 4))
def test_every_example_is_seen_equally_often(buckets: list[int], batch: int, seed: int, rounds: int) -> None:
    plan = Order(tuple(buckets), batch, seed)
    steps = plan.batches_before(rounds)
    seen = Counter(i for step in range(steps) for i in plan.batch(step))
    counts = Counter(buckets)
    for index, bucket in enumerate(buckets):
        # Whole passes, and at most the rest of one batch over them.
        assert rounds <= seen[index] <= rounds + -(-(batch - 1) // counts[bucket])
    for bucket in counts:
        members = [seen[i] for i, b in enumerate(buckets) if b == bucket]
        assert max(members) - min(members) <= 1
    assert sum(seen.values()) == steps * batch


@settings(max_examples=60)
@given(buckets, sizes, st.integers(0, 9), st.integers(0, 300))
def test_batches_are_full_and_of_one_bucket(buckets: list[int], batch: int, seed: int, step: int) -> None:
    chosen = batch_indices(buckets, batch, seed, step)
    assert len(chosen) == batch and len({buckets[i] for i in chosen}) == 1


@settings(max_examples=40)
@given(buckets, sizes, st.integers(0, 9), st.permutations(range(25)))
def test_a_batch_does_not_depend_on_how_its_step_was_reached(
    buckets: list[int], batch: int, seed: int, steps: list[int]
) -> None:
    forward = [batch_indices(buckets, batch, seed, step) for step in range(25)]
    assert {step: Order(tuple(buckets), batch, seed).batch(step) for step in steps} == dict(enumerate(forward))


def test_the_seed_and_the_pass_decide_the_order() -> None:
    first = [batch_indices([0] * 8, 8, 0, step) for step in range(3)]
    assert all(sorted(batch) == list(range(8)) for batch in first)
    assert len({tuple(batch) for batch in first}) == 3
    assert first != [batch_indices([0] * 8, 8, 1, step) for step in range(3)]


def test_the_order_is_pinned_and_the_same_in_another_process() -> None:
    # Loaded from its file, past the package's own imports: it needs nothing but the standard library.
    call = (
        f"import runpy; b = runpy.run_path({str(Path(order.__file__))!r})['batch_indices'];"
        "print([b([0, 0, 1, 0, 1], 2, 7, s) for s in range(6)])"
    )
    env = {"PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(order.__file__).parents[2])}
    run = subprocess.run([sys.executable, "-c", call], env=env, capture_output=True, text=True, check=True)
    here = [batch_indices([0, 0, 1, 0, 1], 2, 7, step) for step in range(6)]
    assert run.stdout.strip() == str(here)
    # A change here changes what every resumed run learns.
    assert here == [[3, 1], [0, 1], [2, 4], [3, 0], [2, 4], [0, 3]]


def test_a_late_step_of_a_large_set_is_found_at_once() -> None:
    buckets = [i % 37 for i in range(5_000)]
    assert len(batch_indices(buckets, 16, 0, 10_000_000)) == 16


def test_impossible_orders_are_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to train on"):
        batch_indices([], 1, 0, 0)
    with pytest.raises(ConfigError, match="batch size 0"):
        batch_indices([0], 0, 0, 0)
    with pytest.raises(ConfigError, match="step -1"):
        batch_indices([0], 1, 0, -1)
