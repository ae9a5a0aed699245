"""Settings: their defaults, where they come from, and what they refuse."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from worker import Settings
from worker.cli import _parser
from worker.config import MEBIBYTE, usable_memory


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("WORKER_") or name == "RUST_MIN_STACK":
            monkeypatch.delenv(name)


def _code(**values: Any) -> Settings:
    return Settings(**values)


def _command_line(*arguments: str) -> Settings:
    return Settings(**vars(_parser().parse_args(arguments)))


DEFAULTS = {
    "allow_nodes": (),
    "max_plan_nodes": 20_000,
    "max_plan_partitions": 1 << 16,
    "max_plan_channels": 1 << 18,
    "max_plan_batch_size": 1 << 20,
    "max_plan_value_size": 128 << 10,
    "max_plan_data_size": 1 << 30,
    "max_plan_operands": 1000,
    "max_plan_conjuncts": 512,
    "max_plan_columns": 10_000,
    "max_plan_sort_columns": 1_000_000,
    "host": "127.0.0.1",
    "port": 8000,
    "supervisor": True,
    "workers": 1,
    "session_builder": None,
    "location": None,
    "version": "",
    "cluster_workers": (),
    "allow_path": (),
    "allow_writes": False,
    "memory": usable_memory() * 3 // 4,
    "memory_limit": None,
    "max_tasks": 1000,
    "max_streams": 4000,
    "max_waiting": 1000,
    "max_wait": 30,
    "max_duration": None,
    "max_spill": None,
    "spill_folder": None,
    "max_ticket_size": 64 * MEBIBYTE,
    "max_flight_info_size": 16 * MEBIBYTE,
    "max_message_size": 4 * MEBIBYTE,
    "compression": "none",
    "idle_time": 60,
    "grace": 30,
    "shutdown_delay": 0,
    "tls_cert": None,
    "tls_key": None,
    "tls_client_ca": None,
    "auth_token_file": None,
    "insecure": False,
    "keepalive_time": 60,
    "max_connection_age": None,
    "max_connection_age_grace": None,
    "reflection": True,
    "log_level": "info",
    "log_format": "text",
    "metrics_port": None,
}


@pytest.mark.parametrize("make", [Settings, _command_line])
def test_the_defaults_are_pinned(make: Callable[[], Settings]) -> None:
    assert make().model_dump() == DEFAULTS


# A setting, its text, and what it is then.
VALUES = [
    ("allow_nodes", "symmetric_hash_join,40", ("symmetric_hash_join", "40")),
    ("max_plan_nodes", "100", 100),
    ("max_plan_partitions", "100", 100),
    ("max_plan_channels", "100", 100),
    ("max_plan_batch_size", "8192", 8192),
    ("max_plan_value_size", "1KiB", 1024),
    ("max_plan_data_size", "1GB", 10**9),
    ("max_plan_operands", "4000", 4000),
    ("max_plan_conjuncts", "100", 100),
    ("max_plan_columns", "100", 100),
    ("max_plan_sort_columns", "100", 100),
    ("host", "0.0.0.0", "0.0.0.0"),
    ("port", "0", 0),
    ("supervisor", "false", False),
    ("workers", "4", 4),
    ("session_builder", "my_module:build", "my_module:build"),
    ("location", "grpc+tls://worker-3:443", "grpc+tls://worker-3:443"),
    ("version", "2026-11-25", "2026-11-25"),
    ("cluster_workers", "http://a:8000,https://b", ("http://a:8000", "https://b")),
    ("allow_path", "/usr,/var/tmp", (Path("/usr"), Path("/var/tmp"))),
    ("allow_writes", "true", True),
    ("memory", "12GiB", 12 << 30),
    ("memory_limit", "4GiB", 4 << 30),
    ("max_tasks", "10", 10),
    ("max_streams", "10", 10),
    ("max_waiting", "0", 0),
    ("max_wait", "0", 0),
    ("max_duration", "0.5", 0.5),
    ("max_spill", "1GB", 10**9),
    ("spill_folder", "/var/tmp", Path("/var/tmp")),
    ("max_ticket_size", "1MB", 10**6),
    ("max_flight_info_size", "512", 512),
    ("max_message_size", "64KiB", 64 << 10),
    ("compression", "zstd", "zstd"),
    ("idle_time", "0.5", 0.5),
    ("grace", "0", 0),
    ("shutdown_delay", "2", 2),
    ("tls_cert", __file__, Path(__file__)),
    ("tls_key", __file__, Path(__file__)),
    ("tls_client_ca", __file__, Path(__file__)),
    ("auth_token_file", __file__, Path(__file__)),
    ("insecure", "true", True),
    ("keepalive_time", "30", 30),
    ("max_connection_age", "300", 300),
    ("max_connection_age_grace", "0.5", 0.5),
    ("reflection", "false", False),
    ("log_level", "debug", "debug"),
    ("log_format", "json", "json"),
    ("metrics_port", "0", 0),
]


def test_the_values_below_are_of_every_setting() -> None:
    assert [name for name, _, _ in VALUES] == list(Settings.model_fields) == list(DEFAULTS)


@pytest.mark.parametrize(("name", "text", "value"), VALUES)
def test_a_setting_has_one_name_in_code_environment_and_command_line(
    name: str, text: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = DEFAULTS | {name: value}
    option = f"--{name.replace('_', '-')}"
    assert _code(**{name: text}).model_dump() == expected
    if isinstance(value, bool):
        assert _command_line(option if value else f"--no-{option.removeprefix('--')}").model_dump() == expected
    else:
        assert _command_line(option, text).model_dump() == expected
        assert _command_line(f"{option}={text}").model_dump() == expected
    monkeypatch.setenv(f"WORKER_{name.upper()}", text)
    assert Settings().model_dump() == expected
    assert _command_line().model_dump() == expected


def test_an_option_of_several_values_may_come_several_times() -> None:
    urls = ("http://a:1", "http://b:2", "https://c:3")
    settings = _command_line("--cluster-workers", ",".join(urls[:2]), f"--cluster-workers={urls[2]}")
    assert settings.cluster_workers == urls


def test_the_last_of_several_flags_counts() -> None:
    assert _command_line("--no-reflection", "--reflection").reflection
    assert not _command_line("--reflection", "--no-reflection").reflection


def test_code_and_command_line_go_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_PORT", "1")
    monkeypatch.setenv("WORKER_GRACE", "2")
    for settings in (Settings(port=3), _command_line("--port", "3")):
        assert (settings.port, settings.grace) == (3, 2)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("port", "65536"),
        ("port", "-1"),
        ("port", "http"),
        ("workers", "0"),
        ("location", "worker-3:8000"),
        ("location", "http://worker-3:8000"),
        ("location", "grpc://"),
        ("memory", "0"),
        ("memory_limit", "0"),
        ("memory_limit", "plenty"),
        ("max_tasks", "0"),
        ("max_streams", "0"),
        ("max_waiting", "-1"),
        ("max_wait", "-1"),
        ("max_wait", "inf"),
        ("max_duration", "0"),
        ("max_spill", "1000"),
        ("max_ticket_size", "0"),
        ("max_ticket_size", "2GiB"),
        ("max_flight_info_size", "-1"),
        ("max_message_size", "63KiB"),
        ("max_message_size", "2GiB"),
        ("compression", "gzip"),
        ("idle_time", "0"),
        ("idle_time", "inf"),
        ("grace", "-1"),
        ("grace", "nan"),
        ("grace", "inf"),
        ("shutdown_delay", "-0.1"),
        ("tls_cert", "/nowhere/worker.pem"),
        ("tls_key", "/"),
        ("auth_token_file", "/dev/null"),
        ("insecure", "perhaps"),
        ("keepalive_time", "0"),
        ("keepalive_time", "2000001"),
        ("max_connection_age", "inf"),
        ("max_connection_age_grace", "0"),
        ("reflection", "maybe"),
        ("log_level", "loud"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_by_its_name(
    name: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(make: Callable[[], Settings]) -> None:
        with pytest.raises(ValidationError) as caught:
            make()
        assert [error["loc"] for error in caught.value.errors()] == [(name,)]

    refused(lambda: _code(**{name: text}))
    if Settings.model_fields[name].annotation is not bool:
        refused(lambda: _command_line(f"--{name.replace('_', '-')}={text}"))
    monkeypatch.setenv(f"WORKER_{name.upper()}", text)
    refused(Settings)


def test_an_ipv6_host_may_be_in_brackets() -> None:
    assert [Settings(host=host).host for host in ("[::1]", "::1", "localhost")] == ["::1", "::1", "localhost"]


def test_a_setting_that_is_none_is_refused() -> None:
    with pytest.raises(ValidationError, match="idle_tiem"):
        Settings(idle_tiem=5)  # type: ignore[call-arg]


def test_settings_cannot_be_changed() -> None:
    settings = Settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 1


def test_variables_of_other_programs_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_POOL", "4")
    monkeypatch.setenv("PORT", "4")
    assert Settings().model_dump() == DEFAULTS


@pytest.mark.parametrize(
    "arguments", [["--por", "1"], ["--unknown", "1"], ["--port"], ["extra"], ["--no-port"], ["--reflection=true"]]
)
def test_the_command_line_refuses_what_it_does_not_know(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        _command_line(*arguments)
    assert caught.value.code == 2
    assert "usage: python -m worker" in capsys.readouterr().err


def test_the_help_says_every_option_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        _command_line("--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}{',' if field.annotation is bool else ''} " in text
        assert field.description is not None
        assert field.description in text
    assert "--reflection, --no-reflection" in text
    assert "(default: 8000)" in text
    assert "(default: 64.0MiB)" in text


def test_usable_memory_is_within_the_machines() -> None:
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < usable_memory() <= machine


def test_an_empty_variable_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_SPILL_FOLDER", "")
    monkeypatch.setenv("WORKER_PORT", "")
    assert (Settings().spill_folder, Settings().port) == (None, 8000)


@pytest.mark.parametrize(
    ("values", "size"),
    [
        ({"memory": 8 << 30}, 1 << 30),
        ({"memory": 100 * MEBIBYTE}, 64 * MEBIBYTE),
        ({"memory": 10 * MEBIBYTE}, 10 * MEBIBYTE),
        ({"memory": 8 << 30, "memory_limit": 5}, 5),
    ],
)
def test_a_task_has_a_pool_of_an_eighth_of_the_memory_unless_it_is_set(values: dict[str, int], size: int) -> None:
    assert _code(**values).pool_size == size
