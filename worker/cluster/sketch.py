"""Percentiles that coordinators can merge: a DDSketch (https://arxiv.org/abs/1908.10693) of positive numbers.

Its bytes are those of the Rust crate ``sketches-ddsketch`` 0.3, written by ``bincode`` 1 (little endian, lengths of
eight bytes). Sketches of other parameters than its defaults are dropped by whoever merges, without a word.
"""

import math
from collections import Counter
from struct import Struct

# The crate's defaults: percentiles are right within one percent.
_MAX_BINS = 2048
_ACCURACY = 0.01
_SMALLEST = 1e-9
_GAMMA = 1.0 + (2.0 * _ACCURACY) / (1.0 - _ACCURACY)
_LOG_GAMMA = math.log1p((2.0 * _ACCURACY) / (1.0 - _ACCURACY))
_CONFIG = Struct("<Idddi").pack(_MAX_BINS, _GAMMA, _LOG_GAMMA, _SMALLEST, 1 - int(math.log(_SMALLEST) / _LOG_GAMMA))

# What follows a store's bins: how many values are in them, the smallest key and the largest, the key of the first bin,
# the most bins, and whether there were more.
_STORE = Struct("<QiiiQ?")
_NO_VALUES = bytes(8) + _STORE.pack(0, 2**31 - 1, -(2**31), 0, _MAX_BINS, False)

# The smallest value, the largest, their sum, and how many were zero.
_FIGURES = Struct("<dddQ")


class Sketch:
    """How numbers are distributed, in a space that does not grow with them."""

    def __init__(self) -> None:
        self._bins: Counter[int] = Counter()
        self.count = 0
        self.sum = 0
        self.min = 0
        """The smallest number, 0 when there is none."""
        self.max = 0
        """The largest number, 0 when there is none."""

    def add(self, value: int) -> None:
        """Takes a number of 1 or more."""
        self._bins[math.ceil(math.log(value) / _LOG_GAMMA)] += 1
        self.min = min(value, self.min) if self.count else value
        self.max = max(value, self.max)
        self.count += 1
        self.sum += value

    def to_bytes(self) -> bytes:
        """What the crate reads."""
        if not self.count:
            return b"".join((_CONFIG, _NO_VALUES, _NO_VALUES, _FIGURES.pack(math.inf, -math.inf, 0, 0)))
        first, last = min(self._bins), max(self._bins)
        bins = [self._bins[key] for key in range(first, last + 1)]
        return b"".join(
            (
                _CONFIG,
                Struct(f"<Q{len(bins)}Q").pack(len(bins), *bins),
                _STORE.pack(self.count, first, last, first, _MAX_BINS, False),
                _NO_VALUES,
                _FIGURES.pack(self.min, self.max, self.sum, 0),
            )
        )
