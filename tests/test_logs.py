"""Log lines: one an event, whatever a client sends, and nobody who waits for them."""

import asyncio
import io
import json
import logging
import os
import re
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TextIO

import grpc
import pyarrow as pa
import pytest
from datafusion import SessionContext
from hypothesis import given
from hypothesis import strategies as st
from support import do_get, fetch_one, listening, stage_key, status_of, until
from worker_service import coordinated, plan_of

import worker
from fuzz.building import file_scan
from worker import logs
from worker.client import WorkerClient
from worker.logs import Event, JsonFormatter, Lines, TextFormatter
from worker.testing import RunningWorker, running_worker

FIRST = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (DEBUG|INFO|WARNING|ERROR) ")

FORGED = "x\n2026-11-26T10:00:00.000Z INFO request method=DoGet principal=root\r\x1b[31m\u2028\x85"


def record(message: object, *arguments: object, level: int = logging.INFO) -> logging.LogRecord:
    return logging.LogRecord("worker", level, "", 0, message, arguments, None)


@contextmanager
def logger_of(stream: TextIO, formatter: logging.Formatter) -> Iterator[logging.Logger]:
    """A logger that has a handler of lines, which is flushed at the end."""
    handler, logger = Lines(stream), logging.Logger("worker")
    handler.setFormatter(formatter)
    logger.addHandler(handler)
    yield logger
    handler.flush()
    handler.close()


def events(caplog: pytest.LogCaptureFixture) -> list[Event]:
    """What was logged of requests, in order."""
    return [logged.msg for logged in caplog.records if isinstance(logged.msg, Event) and logged.msg.name == "request"]


@asynccontextmanager
async def logged(caplog: pytest.LogCaptureFixture) -> AsyncIterator[RunningWorker]:
    """A worker whose requests have ended, and been logged, at the end of the block."""
    caplog.set_level("INFO", "worker")
    async with running_worker() as running:
        yield running
        await until(lambda: running.worker.statistics().requests == 0)


def select_one() -> bytes:
    return SessionContext().sql("SELECT 1 AS one").execution_plan().to_bytes()


async def test_a_request_is_a_line_with_what_it_asked_for_and_what_was_sent(caplog: pytest.LogCaptureFixture) -> None:
    key = stage_key()
    async with logged(caplog) as running:
        await fetch_one(running, do_get(select_one(), key=key))
        sent = running.worker.statistics().bytes_sent
    (event,) = events(caplog)
    seconds, principal = event.fields.pop("seconds"), event.fields.pop("principal")
    assert event.fields == {
        "method": "DoGet",
        "status": "OK",
        "rows": 1,
        "bytes": sent,
        "query": str(worker.PlanTicket.from_bytes(do_get(b"x", key=key)).stage_key).partition("/")[0],
        "stage": 1,
        "task": 2,
        "partition": 0,
    }
    assert isinstance(seconds, float)
    assert 0 < seconds < 60
    assert re.fullmatch("[0-9a-f]{32}", str(principal))


async def test_requests_of_a_cluster_have_lines_too(caplog: pytest.LogCaptureFixture) -> None:
    async with logged(caplog) as running, coordinated(running, plan_of([1, 2], [3], [4])) as coordination:
        await coordination.read(range(1, 3))
    read, task = (event.fields for event in events(caplog))
    assert (read["method"], task["method"]) == ("ExecuteTask", "CoordinatorChannel")
    assert (read["partition"], read["partitions"], read["rows"]) == (1, 2, 2)
    assert [read[name] for name in ("query", "stage", "task")] == [task[name] for name in ("query", "stage", "task")]
    assert "partition" not in task


async def test_what_a_client_got_wrong_is_info_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    async with logged(caplog) as running:
        _, details = await status_of(running, b"")
        _, others = await status_of(running, do_get(b"no plan"))
    first, second = events(caplog)
    assert (first.fields["error"], first.fields["reason"]) == ("InvalidTicket", details)
    assert (second.fields["error"], second.fields["reason"]) == ("InvalidPlan", others)
    assert {logged.levelname for logged in caplog.records if logged.name == "worker"} <= {"INFO"}


async def test_a_request_that_is_cancelled_has_a_line(caplog: pytest.LogCaptureFixture) -> None:
    plan = SessionContext().sql("SELECT value FROM range(0, 1000000000000)").execution_plan()
    async with logged(caplog) as running, WorkerClient(running.url) as client:
        batches = client.execute(plan, 0)
        await anext(batches)
        await batches.aclose()
    (event,) = events(caplog)
    assert event.fields["status"] == "CANCELLED"
    assert "error" not in event.fields


async def test_secrets_in_a_url_of_a_plan_are_not_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    plan = file_scan("csv_scan", "x.csv", url="https://ada:password@127.0.0.1:1/").SerializeToString()
    async with logged(caplog) as running:
        await status_of(running, do_get(plan))
    (event,) = events(caplog)
    assert " https://127.0.0.1:1/" in str(event.fields["reason"])
    assert "password" not in caplog.text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("authorization", "Bearer the-token-of-ada"),
        ("authorization", "the-token-of-ada"),
        ("x-my-key", "the-token-of-ada"),
        ("x-key-bin", b"the-token-of-ada"),
    ],
)
async def test_a_token_that_a_session_builder_puts_into_its_error_is_not_in_the_log(
    name: str, value: str | bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    token = "the-token-of-ada"

    def build(ctx: worker.WorkerQueryContext) -> SessionContext:
        sent = ctx.headers[name]
        raise KeyError(sent.removeprefix("Bearer ") if isinstance(sent, str) else sent)

    async with running_worker(build) as running, WorkerClient(running.url, headers=[(name, value)]) as client:
        with pytest.raises(grpc.aio.AioRpcError):
            await anext(client.execute(select_one(), 0))
        await until(lambda: running.worker.statistics().requests == 0)
    assert "KeyError: " in caplog.text
    assert "'***'" in caplog.text
    assert token not in caplog.text
    (event,) = events(caplog)
    assert token not in TextFormatter().format(record(event)) + JsonFormatter().format(record(event))


@pytest.mark.parametrize("log_format", ["text", "json"])
async def test_lines_of_a_process_are_events_whatever_clients_send(log_format: str) -> None:
    """Also those of errors that have what a client wrote in them: here, a text that is no number."""
    session = SessionContext()
    session.register_record_batches("t", [[pa.record_batch({"text": [FORGED]})]])
    plan = session.sql("SELECT CAST(text AS BIGINT) FROM t").execution_plan().to_bytes()
    arguments = ("-m", "worker", "--port", "0", "--log-format", log_format)
    async with listening(*arguments) as (process, url), WorkerClient(url) as client:
        with pytest.raises(grpc.aio.AioRpcError):
            await anext(client.execute(plan, 0))
        async for _ in client.execute(select_one(), 0):
            pass
        process.terminate()
        assert process.stderr is not None
        lines = (await asyncio.wait_for(process.stderr.read(), 30)).decode().split("\n")
    assert lines.pop() == ""
    if log_format == "json":
        found = [(line["message"], line.get("status")) for line in map(json.loads, lines)]
        (reason,) = (line["reason"] for line in map(json.loads, lines) if "reason" in line)
        assert FORGED in reason
    else:
        assert all(FIRST.match(line) and line.isprintable() for line in lines), lines
        found = [
            (line.split(" ")[2], status[1] if (status := re.search(r" status=(\w+)", line)) else None) for line in lines
        ]
        assert "principal=root" in "".join(lines)
    assert [(message, status) for message, status in found if status] == [
        ("request", "INVALID_ARGUMENT"),
        ("request", "OK"),
    ]


async def test_a_level_above_info_leaves_out_requests_but_those_that_the_worker_failed_in(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def build(ctx):\n    if 'x-fail' in ctx.headers:\n        1 / 0\n    return ctx.builder.build()\n"
    )
    arguments = ("-m", "worker", "--port", "0", "--log-level", "warning", "--session-builder", "mine:build")
    async with listening(*arguments, folder=tmp_path) as (process, url):
        async with WorkerClient(url) as client:
            async for _ in client.execute(select_one(), 0):
                pass
        async with WorkerClient(url, headers={"x-fail": "yes"}) as client:
            with pytest.raises(grpc.aio.AioRpcError):
                await anext(client.execute(select_one(), 0))
        process.terminate()
        assert process.stderr is not None
        first, *traceback = (await asyncio.wait_for(process.stderr.read(), 30)).decode().splitlines()
    assert re.search(" ERROR request method=DoGet status=INTERNAL .*error=SessionBuilderFailed", first)
    assert (
        traceback[-1] == "    worker.errors.SessionBuilderFailed: the session builder failed: the worker's log says why"
    )
    assert all(line.startswith("    ") for line in traceback)
    assert "    ZeroDivisionError: division by zero" in traceback


texts = st.text() | st.sampled_from([FORGED, "", 'a="b"', "a b", "\\", "é", "\udcff"])


@given(
    values=st.dictionaries(st.sampled_from(["query", "reason", "principal"]), texts | st.integers() | st.none()),
    name=texts,
)
def test_any_values_make_one_line_that_tells_them_apart(values: dict[str, str | int | None], name: str) -> None:
    kept = {field: value for field, value in values.items() if value is not None}
    text = TextFormatter().format(record(Event("request", **values)))
    assert text.isprintable()
    quoted = r"\"(?:[^\"\\]|\\.)*\""
    assert re.findall(rf" (\w+)=(?:{quoted}|[^ \"=\\]+)(?= |$)", text) == list(kept)
    assert TextFormatter().format(record("%s", name)).isprintable()
    line = JsonFormatter().format(record(Event("request", **values)))
    assert line.isascii()
    assert line.isprintable()
    read = json.loads(line)
    assert {field: read[field] for field in kept} == kept
    assert set(read) == {"time", "level", "message", *kept}


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()])
def test_tracebacks_are_indented_or_a_field(formatter: logging.Formatter) -> None:
    written = io.StringIO()
    with logger_of(written, formatter) as logger:
        try:
            raise ValueError(FORGED)
        except ValueError:
            logger.exception("it failed with %d", 1)
    first, *others = written.getvalue().split("\n")[:-1]
    if isinstance(formatter, JsonFormatter):
        line = json.loads(first)
        assert (line["level"], line["message"], others) == ("error", "it failed with 1", [])
        assert "ValueError: x" in line["traceback"]
    else:
        assert first.endswith(" ERROR it failed with 1")
        assert others[0] == "    Traceback (most recent call last):"
        assert all(line.startswith("    ") and line.isprintable() for line in others)


def test_other_formatters_show_an_event_with_its_fields() -> None:
    event = Event("request", "Traceback:\n  here", method="DoGet", reason="not now", query=None)
    shown = logging.Formatter("%(levelname)s %(message)s").format(record(event))
    assert shown == 'INFO request method=DoGet reason="not now"\n    Traceback:\n      here'


def test_what_is_logged_later_does_not_change_what_was_logged_before() -> None:
    written, changing = io.StringIO(), ["before"]
    with logger_of(written, TextFormatter()) as logger:
        logger.info("%s", changing)
        changing[0] = "after"
    assert "['before']" in written.getvalue()


def test_a_record_that_cannot_be_formatted_takes_no_other_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    class Bad:
        def __str__(self) -> str:
            raise ValueError

    written = io.StringIO()
    with logger_of(written, TextFormatter()) as logger:
        logger.info(Event("bad", value=Bad()))  # type: ignore[arg-type]
        logger.info("good")
    assert written.getvalue().endswith(" INFO good\n")
    assert "Logging error" in capsys.readouterr().err


def test_nobody_waits_for_a_reader_who_does_not_read_and_what_is_dropped_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    1. The pipe is full, and the thread that writes waits.
    2. More lines come than may wait: logging goes on.
    3. The reader reads on: it gets the lines that waited, and how many are missing.
    """
    monkeypatch.setattr(logs, "MOST_LINES", 100)
    monkeypatch.setattr(logs, "FLUSH_SECONDS", 60)
    number, long = 1000, "x" * 1000
    receiving, sending = os.pipe()
    with os.fdopen(sending, "w") as stream, logger_of(stream, TextFormatter()) as logger:
        for line in range(number):
            logger.warning("line %d %s", line, long)
        read = bytearray()

        def read_all() -> None:
            while data := os.read(receiving, 1 << 16):
                read.extend(data)

        reader = threading.Thread(target=read_all)
        reader.start()
        logger.handlers[0].flush()
        logger.warning("the end")
        logger.handlers[0].flush()
    reader.join()
    os.close(receiving)
    text = read.decode()
    dropped = sum(int(count) for count in re.findall(r" WARNING log lines dropped lines=(\d+)$", text, re.MULTILINE))
    arrived = [int(line) for line in re.findall(r" line (\d+) x+$", text, re.MULTILINE)]
    assert arrived == sorted(arrived)
    assert dropped >= number // 2
    assert len(arrived) + dropped == number
    assert text.endswith(" WARNING the end\n")
