"""Plans that mean harm: a fuzzer that makes them, and the corpus of those that are kept.

``python -m fuzz`` mutates real plans and sends them to a running worker, next to a query that must go on getting its
rows; ``python -m fuzz.corpus`` writes those that are kept, in ``tests/data/hostile``. ``python -m fuzz.abuse`` sends
them, and does all else that clients should not do, for ten minutes, and looks at what is left of it.

Layers, each importing only from those before it: cases; building, seeds; arrow, mutate, minimize; target; recipes,
corpus; held, customer, abusers, abuse; the command line.
"""
