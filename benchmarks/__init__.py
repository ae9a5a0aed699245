"""How fast the worker is, next to a ``pyarrow.flight`` (C++) server that executes the same plans.

``python -m benchmarks.throughput`` starts both and takes turns between them, so that whatever else the machine does
slows down both. Compare the ratios; the rest depends on the machine. ``docs/performance.md`` says what it shows.
"""
