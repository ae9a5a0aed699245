"""How fast the worker is, next to a ``pyarrow.flight`` (C++) server that does the same.

``python -m benchmarks.throughput`` and ``python -m benchmarks.latency`` start both servers and take turns between
them, so that whatever else the machine does slows down both. Compare the ratios; the rest depends on the machine.
"""
