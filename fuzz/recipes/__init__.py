"""The hostile plans that are made by hand: what is known to hurt an engine, or a worker that trusts whoever asks."""

from collections.abc import Iterator

from fuzz.recipes import expressions, extensions, files, functions, nodes, requests, sizes, streams, values
from fuzz.recipes.recipe import Recipe

_MODULES = (sizes, values, streams, expressions, functions, files, nodes, extensions, requests)


def recipes() -> Iterator[Recipe]:
    """All of them; their names differ."""
    for module in _MODULES:
        yield from module.recipes()
