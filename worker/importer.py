"""Finding a user's session builder by its name, ``module:attr``."""

import importlib
import sys
from pathlib import Path
from typing import Any

from worker.config import UnfitSettings
from worker.session import SessionBuilder


class ImportFailed(UnfitSettings):
    """The session builder cannot be loaded; the text says what is wrong with the name, or with what it names."""


def load_session_builder(name: str) -> SessionBuilder:
    """The session builder of a name such as ``my_company.workers:build_state``.

    Modules are looked for in the current folder too, as ``python -m`` does.

    Raises:
        ImportFailed: the name is not of that form, there is no such module or attribute, the module fails when it is
            imported, or the attribute is no session builder.
    """
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise ImportFailed(f"session builder {name!r} is not of the form module:attr, such as my_module:build_state")
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, folder)
    try:
        target: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ImportFailed(f"session builder {name!r}: there is no module {error.name!r}") from error
        raise ImportFailed(f"session builder {name!r}: {module_name} needs {error.name!r}, which is missing") from error
    except Exception as error:
        raise ImportFailed(
            f"session builder {name!r}: importing {module_name} failed with {type(error).__name__}: {error}"
        ) from error
    for part in attribute.split("."):
        try:
            target = getattr(target, part)
        except AttributeError as error:
            raise ImportFailed(f"session builder {name!r}: {module_name} has no attribute {attribute!r}") from error
    try:
        return SessionBuilder(target)
    except TypeError as error:
        raise ImportFailed(f"session builder {name!r}: {error}") from error
