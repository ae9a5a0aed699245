"""What may import what, what the package exports, and that its errors are complete."""

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import grpc
import pytest

import worker
from worker import errors

PACKAGE = Path(worker.__file__).parent
COMMAND_LINES = ("cli", "probe", "__main__")

# What knows neither the protocol nor its messages.
CORE = ("plan", "session", "encoding", "execution")

# What only computes.
PURE = ("message", "ipc", "headers", "ticket", "encoding")


def _layers() -> list[str]:
    """The names in the package's docstring, in its order."""
    text = " ".join((worker.__doc__ or "").split())
    stated = re.search(r"each importing only from those before it: (.+)\.", text)
    assert stated is not None, text
    names = re.split(r"[;,] ", stated.group(1).replace("the command lines", ", ".join(COMMAND_LINES)))
    assert len(names) == len(set(names))
    return names


LAYERS = _layers()


def _modules() -> dict[str, Path]:
    """Every module that is written by hand, by its full name."""
    return {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.parent.name != "proto"
    }


MODULES = _modules()


def _imports(module: str) -> Iterator[str]:
    """The full names of what a module imports, wherever in it that is."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _layer(name: str) -> str:
    """The layer of a module, or of something in it."""
    parts = name.split(".")
    return parts[-1] if parts[-1] in COMMAND_LINES else parts[1]


def _of(layers: tuple[str, ...]) -> list[str]:
    """The modules of layers."""
    return [module for module in MODULES if module != "worker" and _layer(module) in layers]


def _own(module: str) -> list[str]:
    """What a module imports from this package, without what is generated."""
    imported = [name for name in _imports(module) if name.split(".")[0] == "worker"]
    return [name for name in imported if not name.startswith("worker.proto")]


def test_every_module_has_a_layer() -> None:
    assert {_layer(module) for module in MODULES if module != "worker"} == set(LAYERS)


@pytest.mark.parametrize("module", [module for module in MODULES if module != "worker"])
def test_module_imports_only_from_layers_before_it(module: str) -> None:
    own = LAYERS.index(_layer(module))
    for name in _own(module):
        assert "." in name, f"{module} imports the whole package"
        assert _layer(name) in LAYERS, f"{module} imports {name} from the package instead of its module"
        inside = len(name.split(".")) > 2 and _layer(name) == _layer(module) and MODULES[module].parent != PACKAGE
        assert inside or LAYERS.index(_layer(name)) < own, f"{module} imports {name}, a layer not before its own"


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Also within a package, whose modules are one layer."""
    imported = {
        module: [name if name in MODULES else name.rpartition(".")[0] for name in _own(module)] for module in MODULES
    }
    TopologicalSorter(imported).prepare()


def test_the_package_imports_nothing_above_the_service() -> None:
    """So that whoever embeds the servicer in a server of their own loads no other server."""
    assert max(LAYERS.index(_layer(name)) for name in _own("worker")) == LAYERS.index("service")


def test_the_command_line_loads_nothing_that_only_workers_need() -> None:
    """So that a supervisor starts at once, takes little memory, and does not end by what ends a worker."""
    loads = "import sys, worker.cli; print({name.partition('.')[0] for name in sys.modules})"
    printed = subprocess.run([sys.executable, "-c", loads], check=True, capture_output=True, text=True).stdout
    assert not {"grpc", "pyarrow", "datafusion", "numpy"} & set(ast.literal_eval(printed))


@pytest.mark.parametrize("module", _of(CORE))
def test_the_core_knows_neither_grpc_nor_flight(module: str) -> None:
    imported = list(_imports(module))
    assert not [name for name in imported if name.split(".")[0] == "grpc" or "Flight_pb2" in name]


@pytest.mark.parametrize("module", _of(PURE))
def test_what_is_pure_has_no_event_loop(module: str) -> None:
    assert not {"asyncio", "grpc", "threading"} & {name.split(".")[0] for name in _imports(module)}


def test_the_exports_are_pinned() -> None:
    assert worker.__all__ == [
        "ComputationFailed",
        "DefaultPolicy",
        "DefaultSessionBuilder",
        "DurationExceeded",
        "EnginePanicked",
        "ExecutionFailed",
        "FailedPrecondition",
        "Headers",
        "InvalidHeader",
        "InvalidPlan",
        "InvalidRequest",
        "InvalidTicket",
        "MemoryExceeded",
        "NotFound",
        "PartitionOutOfRange",
        "PermissionDenied",
        "PlanAccess",
        "PlanNotSet",
        "PlanPolicy",
        "PlanQuarantined",
        "PlanTicket",
        "PlanTooLarge",
        "QueryEnded",
        "QuotaExceeded",
        "ResourcesExhausted",
        "ResponseTooLarge",
        "SessionBuilder",
        "SessionBuilderFailed",
        "SessionStateBuilder",
        "Settings",
        "SourceCorrupt",
        "SourceDenied",
        "SourceFailed",
        "SourceNotFound",
        "StageKey",
        "StageKeyConflict",
        "Statistics",
        "TokenAuth",
        "Touched",
        "Unauthenticated",
        "Unavailable",
        "UnfitSettings",
        "UpstreamFailed",
        "Worker",
        "WorkerBusy",
        "WorkerError",
        "WorkerQueryContext",
        "WorkerSessionBuilder",
        "add_FlightServiceServicer_to_server",
        "add_ObservabilityServiceServicer_to_server",
        "add_WorkerServiceServicer_to_server",
        "keep_freed_memory",
        "plan_ticket",
        "server_options",
    ]


def test_the_exports_are_sorted_and_everything_that_the_package_imports() -> None:
    assert worker.__all__ == sorted(worker.__all__)
    assert set(worker.__all__) == {name.rpartition(".")[2] for name in _own("worker")}
    assert all(hasattr(worker, name) for name in worker.__all__)


ERRORS = [error for _, error in inspect.getmembers(errors, inspect.isclass) if issubclass(error, errors.WorkerError)]


def _drawn() -> dict[str, tuple[int, str]]:
    """By an error's name, its depth in the tree that the module's docstring draws, and its status there."""
    lines = re.findall(r"^ {4}([ │├└─]*)(\w+) +([A-Z_]+)\b", errors.__doc__ or "", re.MULTILINE)
    return {name: (len(branch) // 4, status) for branch, name, status in lines}


def test_the_docstring_draws_the_tree_of_errors() -> None:
    assert _drawn() == {
        error.__name__: (error.__mro__.index(errors.WorkerError), error.status.name) for error in ERRORS
    }


@pytest.mark.parametrize("error", ERRORS)
def test_error_has_a_status_of_failure_a_docstring_and_is_exported(error: type[errors.WorkerError]) -> None:
    assert isinstance(error.status, grpc.StatusCode)
    assert error.status not in {grpc.StatusCode.OK, grpc.StatusCode.UNKNOWN}
    assert error.__doc__
    assert getattr(worker, error.__name__) is error
    assert error.__name__ in worker.__all__
