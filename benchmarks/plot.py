"""Where the wall time goes, drawn: needs matplotlib, which nothing else here does."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from benchmarks.rates import Costs

HEIGHT = 0.38


def draw(costs: list[Costs], file: Path) -> None:
    """Two bars a result: the worker's in its parts, below it the whole of pyarrow.flight's."""
    # Text stays text and nothing says when it was drawn: the file is small, and changes only with what it shows.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "benchmark"})
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    places = range(len(costs))
    above = [place - HEIGHT / 2 for place in places]
    below = [place + HEIGHT / 2 for place in places]
    read = [cost.read for cost in costs]
    encode = [max(0, cost.encode - cost.read) for cost in costs]
    before = [sum(parts) for parts in zip(read, encode, strict=True)]
    rest = [max(0, cost.worker - parts) for cost, parts in zip(costs, before, strict=True)]
    axes.barh(above, read, HEIGHT, color="#1f6f8b", label="DataFusion, read in process")
    axes.barh(above, encode, HEIGHT, read, color="#e6a23c", label="+ the worker's encoder")
    axes.barh(above, rest, HEIGHT, before, color="#b8c4cc", label="+ transport and client: the worker's whole")
    axes.barh(below, [cost.other for cost in costs], HEIGHT, color="#5b5b5b", label="pyarrow.flight's whole")
    axes.set_yticks(places, [cost.case for cost in costs])
    axes.invert_yaxis()
    axes.set_xlabel("seconds of wall time a GB of result")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
