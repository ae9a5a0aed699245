"""What coordinators' headers say to a worker, and which of them go on to the workers that it reads from."""

from collections.abc import Sequence

import pytest

from worker.cluster.settings import ClusterSettings, passed_on
from worker.errors import InvalidHeader
from worker.headers import Headers
from worker.output import CONFIG_PREFIX


def settings(**values: str) -> ClusterSettings:
    return ClusterSettings.from_headers(
        Headers((f"{CONFIG_PREFIX}distributed.{name}", value) for name, value in values.items())
    )


def test_what_coordinators_do_not_say_is_upstreams_default() -> None:
    """Those of ``DistributedConfig`` in Distributed DataFusion 4.0.0."""
    assert settings() == ClusterSettings(
        compression="lz4", collect_metrics=True, shuffle_batch_size=0, buffer_budget=64 * 1024 * 1024
    )


def test_what_they_say_is_taken() -> None:
    found = settings(
        compression="zstd",
        collect_metrics="false",
        shuffle_batch_size="10",
        worker_connection_buffer_budget_bytes="1000",
        of_another_version="anything",
    )
    assert found == ClusterSettings(
        compression="zstd", collect_metrics=False, shuffle_batch_size=10, buffer_budget=1000
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("compression", "LZ4"),
        ("collect_metrics", "True"),
        ("shuffle_batch_size", ""),
        ("shuffle_batch_size", "1.5"),
        ("shuffle_batch_size", "²"),
        ("worker_connection_buffer_budget_bytes", "-1"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_name_and_value(name: str, value: str) -> None:
    with pytest.raises(InvalidHeader, match=f"distributed.{name}' is '{value}'"):
        settings(**{name: value})


def test_a_setting_that_is_there_twice_is_refused() -> None:
    name = f"{CONFIG_PREFIX}distributed.collect_metrics"
    with pytest.raises(InvalidHeader, match="was sent 2 times"):
        ClusterSettings.from_headers(Headers([(name, "true"), (name, "true")]))


def test_all_headers_go_on_but_the_transports() -> None:
    kept: Sequence[tuple[str, str | bytes]] = [
        ("authorization", "Bearer ada"),
        ("x-thing-bin", b"\x00\xff"),
        ("x-twice", "1"),
        ("x-twice", "2"),
        (f"{CONFIG_PREFIX}distributed.compression", "none"),
        (f"{CONFIG_PREFIX}datafusion.execution.batch_size", "5"),
    ]
    transports: Sequence[tuple[str, str | bytes]] = [
        ("user-agent", "grpc-rust"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("grpc-timeout", "1S"),
        ("grpc-accept-encoding", "gzip"),
    ]
    assert passed_on(Headers([*transports, *kept])) == kept
