"""Which examples make up the batch of a step: a pure function of the step, so that a resumed run needs no state at all.

Each bucket (pictures of one size) is an endless stream of passes, every pass a fresh shuffle of the whole bucket, cut into
full batches; a pass that does not fill its last batch is continued by the next one. So nothing is ever dropped, all
batches are full and of one size (a short batch would give its few pictures a larger say in the mean), and every picture
is seen equally often. Rounds interleave the buckets: by the end of round `r` bucket `b` of `n` pictures has given
`ceil((r + 1) * n / batch)` batches, that is, at least `r + 1` passes, at most one batch more.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from vgm_peft.errors import ConfigError


@dataclass(frozen=True)
class Order:
    """The order of a run: `buckets[i]` is the bucket of example `i`; see the module's text for what is promised."""

    buckets: tuple[int, ...]
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if not self.buckets:
            raise ConfigError("there is nothing to train on", expected="at least one example")
        if self.batch_size < 1:
            raise ConfigError(f"batch size {self.batch_size}", expected="at least 1")

    @cached_property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """The examples of each bucket, buckets in ascending order."""
        found: dict[int, list[int]] = {bucket: [] for bucket in sorted(set(self.buckets))}
        for index, bucket in enumerate(self.buckets):
            found[bucket].append(index)
        return tuple(tuple(indices) for indices in found.values())

    def batches_before(self, rounds: int) -> int:
        """Number of batches in the first `rounds` rounds (in each of which every example comes up about once)."""
        return sum(self._given(bucket, rounds) for bucket in range(len(self.members)))

    def batch(self, step: int) -> list[int]:
        """Return the `batch_size` examples of batch `step` (0, 1, 2 ...), all of one bucket."""
        if step < 0:
            raise ConfigError(f"step {step}", expected="0 or more")
        turn = self._round_of(step)
        plan = [
            (bucket, number)
            for bucket in range(len(self.members))
            for number in range(self._given(bucket, turn), self._given(bucket, turn + 1))
        ]
        bucket, number = plan[_shuffled(len(plan), f"{self.seed}/round/{turn}")[step - self.batches_before(turn)]]
        members, first = self.members[bucket], number * self.batch_size
        return [members[self._place(bucket, place)] for place in range(first, first + self.batch_size)]

    def _given(self, bucket: int, rounds: int) -> int:
        return -(-rounds * len(self.members[bucket]) // self.batch_size)

    def _place(self, bucket: int, place: int) -> int:
        size = len(self.members[bucket])
        return _shuffled(size, f"{self.seed}/{bucket}/{place // size}")[place % size]

    def _round_of(self, step: int) -> int:
        # Round r begins no earlier than batch r * examples / batch_size: a short walk back from there finds it.
        turn = step * self.batch_size // len(self.buckets)
        while self.batches_before(turn) > step:
            turn -= 1
        return turn


def batch_indices(buckets: Sequence[int], batch_size: int, seed: int, step: int) -> list[int]:
    """Return the examples in the batch of `step`, given the bucket of every example; the one-call form of `Order`.

    A pure function: the same in every process, and independent of which steps were asked for before.
    """
    return _order(tuple(buckets), batch_size, seed).batch(step)


@lru_cache(maxsize=8)
def _order(buckets: tuple[int, ...], batch_size: int, seed: int) -> Order:
    return Order(buckets, batch_size, seed)


@lru_cache(maxsize=64)
def _shuffled(size: int, tag: str) -> tuple[int, ...]:
    """Return 0 .. size-1 shuffled by the tag alone (seeding by text is hashing with SHA-512, the same everywhere)."""
    numbers = list(range(size))
    random.Random(tag).shuffle(numbers)
    return tuple(numbers)
