"""The messages on the wire are those that others speak, and the generated code is fresh."""

import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.message import Message

from worker.proto import Flight_pb2, plan_pb2

ROOT = Path(__file__).parent.parent
PINS = dict(re.findall(r"([\w-]+)==([\d.]+)", (ROOT / "codegen.sh").read_text()))
GENERATED = ROOT / "worker" / "proto"

SESSION_MESSAGES = {
    "SessionOptionValue": {
        "string_value": (1, "string"),
        "bool_value": (2, "bool"),
        "int64_value": (3, "sfixed64"),
        "double_value": (4, "double"),
        "string_list_value": (5, "message"),
    },
    "SessionOptionValue.StringListValue": {"values": (1, "string")},
    "SetSessionOptionsRequest": {"session_options": (1, "message")},
    "SetSessionOptionsRequest.SessionOptionsEntry": {"key": (1, "string"), "value": (2, "message")},
    "SetSessionOptionsResult": {"errors": (1, "message")},
    "SetSessionOptionsResult.Error": {"value": (1, "enum")},
    "SetSessionOptionsResult.ErrorsEntry": {"key": (1, "string"), "value": (2, "message")},
    "GetSessionOptionsRequest": {},
    "GetSessionOptionsResult": {"session_options": (1, "message")},
    "GetSessionOptionsResult.SessionOptionsEntry": {"key": (1, "string"), "value": (2, "message")},
    "CloseSessionRequest": {},
    "CloseSessionResult": {"status": (1, "enum")},
}

OWN_FIGURES = ("OutputRows", "ElapsedCompute", "SpillCount", "SpilledBytes", "SpilledRows", "CurrentMemoryUsage")
PLAN_MESSAGES = {
    "DoGet": {
        "plan_proto": (1, "bytes"),
        "target_task_index": (2, "uint64"),
        "target_task_count": (3, "uint64"),
        "target_partition": (4, "uint64"),
        "stage_key": (5, "message"),
    },
    "StageKey": {"query_id": (1, "bytes"), "stage_id": (2, "uint64"), "task_number": (3, "uint64")},
    "FlightAppMetadata": {"metrics_collection": (1, "message")},
    "MetricsCollection": {"tasks": (1, "message")},
    "TaskMetrics": {"stage_key": (1, "message"), "metrics": (2, "message")},
    "MetricsSet": {"metrics": (1, "message")},
    "Metric": {
        "output_rows": (1, "message"),
        "elapsed_compute": (2, "message"),
        "spill_count": (3, "message"),
        "spilled_bytes": (4, "message"),
        "spilled_rows": (5, "message"),
        "current_memory_usage": (6, "message"),
        "count": (7, "message"),
        "gauge": (8, "message"),
        "time": (9, "message"),
        "start_timestamp": (10, "message"),
        "end_timestamp": (11, "message"),
        "labels": (12, "message"),
        "partition": (13, "uint64"),
    },
    **{name: {"value": (1, "uint64")} for name in OWN_FIGURES},
    **{name: {"name": (1, "string"), "value": (2, "uint64")} for name in ("NamedCount", "NamedGauge", "NamedTime")},
    **{name: {"value": (1, "int64")} for name in ("StartTimestamp", "EndTimestamp")},
    "Label": {"name": (1, "string"), "value": (2, "string")},
}


def _original() -> descriptor_pb2.FileDescriptorProto:
    files = descriptor_pb2.FileDescriptorSet.FromString((ROOT / "tests" / "data" / "flight.binpb").read_bytes()).file
    return next(file for file in files if file.name == "Flight.proto")


def _generated(descriptor_bytes: bytes) -> descriptor_pb2.FileDescriptorProto:
    return descriptor_pb2.FileDescriptorProto.FromString(descriptor_bytes)


ORIGINAL = _original()
FLIGHT = _generated(Flight_pb2.DESCRIPTOR.serialized_pb)
PLAN = _generated(plan_pb2.DESCRIPTOR.serialized_pb)


def _messages(
    messages: Iterable[descriptor_pb2.DescriptorProto], outer: str = ""
) -> Iterator[tuple[str, descriptor_pb2.DescriptorProto]]:
    for message in messages:
        yield outer + message.name, message
        yield from _messages(message.nested_type, f"{outer}{message.name}.")


def _fields(file: descriptor_pb2.FileDescriptorProto) -> dict[str, dict[str, tuple[int, str]]]:
    return {
        name: {
            field.name: (
                field.number,
                descriptor_pb2.FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower(),
            )
            for field in message.field
        }
        for name, message in _messages(file.message_type)
    }


def _enum_values(file: descriptor_pb2.FileDescriptorProto) -> dict[str, dict[str, int]]:
    enums = {enum.name: enum for enum in file.enum_type}
    for name, message in _messages(file.message_type):
        enums |= {f"{name}.{enum.name}": enum for enum in message.enum_type}
    return {name: {value.name: value.number for value in enum.value} for name, enum in enums.items()}


def _canonical(message: Message) -> bytes:
    """A descriptor as bytes that are equal where nothing but the order of declarations and JSON names differs."""
    canonical = type(message)()
    canonical.CopyFrom(message)
    _sort(canonical)
    return canonical.SerializeToString(deterministic=True)


def _sort(message: Message) -> None:
    for field, value in message.ListFields():
        if field.name == "json_name":
            message.ClearField("json_name")
        elif field.name in {"field", "nested_type", "enum_type", "value", "method"}:
            for child in value:
                _sort(child)
            value.sort(key=lambda child: child.name)


def test_the_package_is_arrows() -> None:
    assert FLIGHT.package == ORIGINAL.package == "arrow.flight.protocol"
    assert FLIGHT.syntax == ORIGINAL.syntax
    assert [*FLIGHT.dependency] == [*ORIGINAL.dependency]


@pytest.mark.parametrize("name", [message.name for message in ORIGINAL.message_type])
def test_message_equals_the_original(name: str) -> None:
    """In its fields' names, numbers, types, labels and oneofs, and in what is nested in it."""
    theirs = next(message for message in ORIGINAL.message_type if message.name == name)
    ours = next(message for message in FLIGHT.message_type if message.name == name)
    assert _canonical(ours) == _canonical(theirs), f"{ours}\nis not\n{theirs}"


@pytest.mark.parametrize("name", [enum.name for enum in ORIGINAL.enum_type])
def test_enum_equals_the_original(name: str) -> None:
    assert _enum_values(FLIGHT)[name] == _enum_values(ORIGINAL)[name]


@pytest.mark.parametrize("name", [method.name for method in ORIGINAL.service[0].method])
def test_rpc_equals_the_original(name: str) -> None:
    """In its messages, and in which of them are streams."""
    theirs = next(method for method in ORIGINAL.service[0].method if method.name == name)
    ours = next(method for method in FLIGHT.service[0].method if method.name == name)
    assert _canonical(ours) == _canonical(theirs), f"{ours}\nis not\n{theirs}"


def test_only_the_session_messages_are_beyond_the_original() -> None:
    beyond = _fields(FLIGHT)
    for name in _fields(ORIGINAL):
        del beyond[name]
    assert beyond == SESSION_MESSAGES
    assert [(service.name, len(service.method)) for service in FLIGHT.service] == [("FlightService", 10)]
    enums = _enum_values(FLIGHT)
    for name in _enum_values(ORIGINAL):
        del enums[name]
    assert enums == {
        "SetSessionOptionsResult.ErrorValue": {"UNSPECIFIED": 0, "INVALID_NAME": 1, "INVALID_VALUE": 2, "ERROR": 3},
        "CloseSessionResult.Status": {"UNSPECIFIED": 0, "CLOSED": 1, "CLOSING": 2, "NOT_CLOSEABLE": 3},
    }


def test_a_session_option_has_one_value_and_options_are_maps() -> None:
    value = Flight_pb2.SessionOptionValue(string_value="a", bool_value=True)
    assert value.WhichOneof("option_value") == "bool_value"
    assert [len(oneof.fields) for oneof in value.DESCRIPTOR.oneofs] == [len(value.DESCRIPTOR.fields)]
    maps = {name for name, message in _messages(FLIGHT.message_type) if message.options.map_entry}
    assert maps == {name for name in SESSION_MESSAGES if name.endswith("Entry")}


def test_the_tickets_numbers_are_those_of_distributed_datafusion() -> None:
    assert _fields(PLAN) == PLAN_MESSAGES
    assert PLAN.package == "worker.plan"
    assert not PLAN.service


def _floors() -> dict[str, str]:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return dict(dependency.split(">=") for dependency in dependencies if dependency.count(">=") == 1)


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


@pytest.mark.parametrize("package", ["grpcio", "grpcio-health-checking", "grpcio-reflection"])
def test_the_floor_of_grpc_is_the_generators_version(package: str) -> None:
    generated = re.search(r"GRPC_GENERATED_VERSION = '(.+)'", (GENERATED / "Flight_pb2_grpc.py").read_text())
    assert generated is not None
    assert generated.group(1) == PINS["grpcio-tools"] == _floors()[package]


@pytest.mark.parametrize("file", ["Flight_pb2.py", "plan_pb2.py"])
def test_the_floor_of_protobuf_is_not_below_the_generators_version(file: str) -> None:
    generated = re.search(r"# Protobuf Python Version: (.+)", (GENERATED / file).read_text())
    assert generated is not None
    assert _version(generated.group(1)) <= _version(_floors()["protobuf"])


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what ``codegen.sh`` works on, with the generator of the working tree where that is installed."""
    shutil.copy(ROOT / "codegen.sh", tmp_path)
    shutil.copytree(ROOT / "proto", tmp_path / "proto")
    shutil.copytree(GENERATED, tmp_path / "worker" / "proto", ignore=shutil.ignore_patterns("__pycache__"))
    if (ROOT / ".codegen").is_dir():
        (tmp_path / ".codegen").symlink_to(ROOT / ".codegen")
    return tmp_path


def _check(tree: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["./codegen.sh", "--check"], cwd=tree, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_codegen_check_passes_here_and_names_what_is_stale(tree: Path) -> None:
    fresh = _check(tree)
    assert fresh.returncode == 0, fresh.stdout + fresh.stderr

    proto = tree / "proto" / "plan.proto"
    proto.write_text(proto.read_text().replace("target_partition = 4", "target_partition = 6"))
    stale = _check(tree)
    assert stale.returncode == 1
    assert "worker/proto/plan_pb2.py" in stale.stdout
    assert "run ./codegen.sh" in stale.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("file", ["plan_pb2.pyi", "Flight_pb2_grpc.py"])
def test_codegen_check_names_a_generated_file_that_is_missing(tree: Path, file: str) -> None:
    (tree / "worker" / "proto" / file).unlink()
    stale = _check(tree)
    assert stale.returncode == 1
    assert file in stale.stdout


def test_codegen_refuses_arguments_that_it_does_not_know(tree: Path) -> None:
    run = subprocess.run(["./codegen.sh", "--chekc"], cwd=tree, capture_output=True, text=True)
    assert run.returncode == 2
    assert "usage" in run.stderr
