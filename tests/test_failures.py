"""What DataFusion's errors are taken for: of real files and stores, and by what they say."""

import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datafusion import RuntimeEnvBuilder, SessionConfig, SessionContext, udf
from datafusion.object_store import AmazonS3

from worker import (
    ComputationFailed,
    EnginePanicked,
    ExecutionFailed,
    ResourcesExhausted,
    SourceCorrupt,
    SourceDenied,
    SourceFailed,
    SourceNotFound,
    WorkerError,
)
from worker import plan as plan_module
from worker.failures import failure, is_panic
from worker.plan import execution_errors

ROWS = 20_000
SECRET = "AWS4-HMAC-SHA256 what was signed"


def _planned(read: Callable[[SessionContext], object], query: str = "SELECT * FROM t") -> bytes:
    session = SessionContext(SessionConfig().with_target_partitions(1))
    read(session)
    return session.sql(query).execution_plan().to_bytes()


def _run(plan: bytes, session: SessionContext | None = None) -> None:
    session = session or SessionContext()
    with execution_errors():
        for batch in session.execute(plan_module.decode(session, plan), 0):
            batch.to_pyarrow()


def _parquet(folder: Path) -> Path:
    file = folder / "t.parquet"
    pq.write_table(pa.table({"a": list(range(ROWS)), "s": [str(number) for number in range(ROWS)]}), file)
    return file


def _overwrite(file: Path, place: int, size: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(place)
        opened.write(b"\xff" * size)


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])


def _become_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


CHANGES: dict[str, tuple[Callable[[Path], object], type[WorkerError]]] = {
    "gone": (Path.unlink, SourceNotFound),
    "empty": (lambda file: file.write_bytes(b""), SourceCorrupt),
    "cut": (_truncate, SourceCorrupt),
    "damaged pages": (lambda file: _overwrite(file, 2000, 20_000), SourceCorrupt),
    "damaged footer": (lambda file: _overwrite(file, file.stat().st_size - 200, 150), SourceCorrupt),
    "a folder": (_become_a_folder, SourceCorrupt),
}


@pytest.mark.parametrize(("change", "expected"), CHANGES.values(), ids=CHANGES)
def test_a_parquet_file_that_is_not_what_it_was(
    change: Callable[[Path], object], expected: type[WorkerError], tmp_path: Path
) -> None:
    file = _parquet(tmp_path)
    plan = _planned(lambda session: session.register_parquet("t", file))
    change(file)
    with pytest.raises(expected) as caught:
        _run(plan)
    assert type(caught.value) is expected
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("t.csv", "a,b\n1,2\n", "a,b\n1,2\n3,4,5\n"),
        ("t.csv", "a,b\n1,2\n", "a,b\n1,many\n"),
        ("t.json", '{"a": 1}\n', '{"a":\n'),
    ],
)
def test_a_text_file_that_is_not_what_it_was(name: str, good: str, bad: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(good)
    is_csv = name.endswith("csv")
    plan = _planned(lambda session: session.register_csv("t", file) if is_csv else session.register_json("t", file))
    file.write_text(bad)
    with pytest.raises(SourceCorrupt):
        _run(plan)
    file.unlink()
    with pytest.raises(SourceNotFound, match=r"t\.\w+ not found: No such file"):
        _run(plan)


class _Store(http.server.BaseHTTPRequestHandler):
    """Serves one file as S3 would, or answers with a status."""

    content = b""
    status = 200

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        body = self.content
        if self.status != 200:
            self.send_response(self.status)
            body = (
                f"<Error><Code>TheCode</Code><Message>why</Message><StringToSign>{SECRET}</StringToSign></Error>"
            ).encode()
        elif asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = (int(first), int(last or len(body) - 1)) if first else (len(body) - int(last), len(body) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(body)}")
            body = body[start : end + 1]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
        self.send_header("ETag", '"1"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _session(endpoint: str) -> SessionContext:
    session = SessionContext(SessionConfig().with_target_partitions(1))
    store = AmazonS3(
        bucket_name="b", region="r", access_key_id="id", secret_access_key="key", endpoint=endpoint, allow_http=True
    )
    session.register_object_store("s3://", store, "b")
    return session


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    _Store.content = _parquet(tmp_path_factory.mktemp("store")).read_bytes()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Store) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        serving.join()


# Of a store that does not answer, or with a server's error, DataFusion asks again, for some three seconds.
@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, SourceDenied),
        (401, SourceDenied),
        (403, SourceDenied),
        (404, SourceNotFound),
        (412, SourceCorrupt),
        (416, SourceCorrupt),
        (503, SourceFailed),
        (None, SourceFailed),
    ],
)
def test_a_store_that_does_not_give_an_object(
    status: int | None, expected: type[WorkerError], endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = _session(endpoint)
    session.register_parquet("t", "s3://b/t.parquet")
    plan = session.sql("SELECT * FROM t").execution_plan().to_bytes()
    _run(plan, _session(endpoint))
    if status is not None:
        monkeypatch.setattr(_Store, "status", status)
    with pytest.raises(expected) as caught:
        # Nothing listens at the first port.
        _run(plan, _session(endpoint if status is not None else "http://127.0.0.1:1"))
    assert type(caught.value) is expected
    text = str(caught.value)
    assert "http://127.0.0.1:" in text
    assert SECRET not in text
    if status is not None:
        assert f"status code: {status} " in text
        assert text.endswith(": TheCode: why")


@pytest.mark.parametrize(
    "query",
    [
        "SELECT a / (a - 7) FROM t",
        "SELECT CAST(s || 'x' AS INT) FROM t",
        "SELECT to_timestamp(s || ' o''clock') FROM t",
        "SELECT abs(a - 9223372036854775807 - 1 - a) FROM t",
        "SELECT gcd(-9223372036854775808, -9223372036854775808 - 0 * a) FROM t",
        "SELECT factorial(a) FROM t",
        "SELECT factorial(a - 1) FROM t",
        "SELECT CAST(a * 1000 AS DECIMAL(3, 1)) FROM t",
        "SELECT CAST(a * -1000 AS DECIMAL(3, 1)) FROM t",
        "SELECT chr(a - 30) FROM t",
        "SELECT make_date(2020, a, 1) FROM t",
        "SELECT make_date(2020, 1, a) FROM t",
        "SELECT make_date(a + 9999999, 1, 1) FROM t",
        "SELECT to_date(s, '%Y') FROM t",
        "SELECT CAST(a + 9223372036854775000 AS TIMESTAMP) FROM t",
        "SELECT date_bin(INTERVAL '0 seconds', to_timestamp(a)) FROM t",
        "SELECT date_part('hairs', to_timestamp(a)) FROM t",
        "SELECT date_trunc('hair', to_timestamp(a)) FROM t",
        "SELECT decode(s || 'x', 'hex') FROM t",
        "SELECT decode(s || '!', 'base64') FROM t",
        "SELECT array_element([a], a + 9223372036854700000) FROM t",
        "SELECT array_slice([a], 1, 2, a) FROM t",
        "SELECT array_position([a], 1, a) FROM t",
        "SELECT substr(s, 1, a - 5) FROM t",
        "SELECT split_part(s, 'x', a) FROM t",
        "SELECT overlay(s PLACING 'x' FROM a) FROM t",
        "SELECT repeat(s, a + 99999999999) FROM t",
        "SELECT range(0, a + 9223372036854700000) FROM t",
        "SELECT range(0, 1, a) FROM t",
        "SELECT generate_series(TIMESTAMP '2020-01-01', TIMESTAMP '2020-01-02', INTERVAL '0 day') FROM t",
        "SELECT map([a, a], [a, a]) FROM t",
        "SELECT map([s, NULL], [a, a]) FROM t",
        "SELECT (SELECT value FROM range(3)) FROM t",
        "SELECT CAST(x'ff' || arrow_cast(s, 'Binary') AS VARCHAR) FROM t",
        "SELECT regexp_replace(s, '(' || s, 'x') FROM t",
    ],
)
def test_what_cannot_be_computed(query: str, tmp_path: Path) -> None:
    file = _parquet(tmp_path)
    with pytest.raises(WorkerError) as caught:
        _run(_planned(lambda session: session.register_parquet("t", file), query))
    assert type(caught.value) is ComputationFailed


def test_what_there_is_no_room_for() -> None:
    def limited(memory: int) -> SessionContext:
        session = SessionContext(SessionConfig(), RuntimeEnvBuilder().with_fair_spill_pool(memory))
        session.sql("SET datafusion.runtime.max_temp_directory_size = '1M'")
        return session

    with pytest.raises(ResourcesExhausted, match="Resources exhausted"):
        _run(_planned(lambda _: None, "SELECT array_agg(value) FROM range(3000000)"), limited(1_000_000))
    with pytest.raises(ResourcesExhausted, match="spilling process has exceeded the allowable limit"):
        _run(_planned(lambda _: None, "SELECT value FROM range(9000000) ORDER BY value % 9973"), limited(20_000_000))


def test_a_function_of_the_users_that_raises_is_shown_without_its_traceback() -> None:
    def fail(values: pa.Array) -> pa.Array:
        raise ValueError("no such thing")

    session = SessionContext()
    session.register_udf(udf(fail, [pa.int64()], pa.int64(), "volatile", "fail"))
    with pytest.raises(ExecutionFailed, match="no such thing") as caught:
        _run(session.sql("SELECT fail(value) FROM range(3)").execution_plan().to_bytes(session), session)
    assert "Traceback" not in str(caught.value)


NAMES = "DataFusion error: Parquet error: Parquet error: Failed to fetch metadata for file a: b.parquet: "

TEXTS: dict[str, type[WorkerError]] = {
    "it failed": ExecutionFailed,
    "DataFusion error: Internal error: an operator is wrong": ExecutionFailed,
    "DataFusion error: External error: task 17 panicked with message 'no'": EnginePanicked,
    "DataFusion error: Arrow error: Io error: No space left on device (os error 28)": ResourcesExhausted,
    "while it sorted\ncaused by\nResources exhausted: no memory left": ResourcesExhausted,
    NAMES + "Object Store error: Generic LocalFileSystem error: Permission denied (os error 13)": SourceDenied,
    NAMES + "Object Store error: Generic S3 error: error decoding response body": SourceFailed,
    "scan\ncaused by\nDataFusion error: Object Store error: Object at location x not found: no": SourceNotFound,
    # What is in rows is no name of an error.
    "DataFusion error: Arrow error: Cast error: Cannot cast string 'Object Store error: '": ComputationFailed,
    "DataFusion error: Execution error: it is no 'Parquet error: '": ExecutionFailed,
    # Of functions that take much memory before they say so.
    "DataFusion error: Execution error: rpad requested length 10000000000 too large, maximum": ComputationFailed,
    "DataFusion error: Execution error: byte array offset overflow: output size exceeds 2147483647": ComputationFailed,
    "DataFusion error: Execution error: array_repeat: offset 19999999998 exceeds the maximum": ComputationFailed,
    "DataFusion error: Execution error: array_resize: resulting array of 19999999998 elements": ComputationFailed,
    # The engine's own, and what a function of the session's says, whatever that is.
    "DataFusion error: Execution error: Failed to decode a message of another stage": ExecutionFailed,
    "DataFusion error: Execution error: ValueError('map key must be unique')": ExecutionFailed,
    "DataFusion error: Arrow error: Invalid argument error: column types must match": ExecutionFailed,
}


@pytest.mark.parametrize(("text", "expected"), TEXTS.items())
def test_what_texts_are_taken_for(text: str, expected: type[WorkerError]) -> None:
    assert type(failure(RuntimeError(text))) is expected


def test_long_texts_are_read_fast() -> None:
    assert type(failure(RuntimeError("DataFusion error: x\ncaused by\n" * 5000 + "no"))) is ExecutionFailed


def test_secrets_of_urls_are_left_out() -> None:
    url = "https://me:pass@account.blob.example/c/t.parquet?sv=2024&sig=abc%3D"
    text = str(
        failure(RuntimeError(f"{NAMES}Object Store error: Generic Azure error: Error performing GET {url} in 3ms"))
    )
    assert text.endswith("Error performing GET https://account.blob.example/c/t.parquet in 3ms")


def test_an_invitation_to_report_bugs_is_left_out() -> None:
    text = "it failed\nThis issue was likely caused by a bug in DataFusion's code. Please help us"
    assert str(failure(RuntimeError(text))) == "it failed"


def test_ordinary_errors_are_no_panics() -> None:
    assert not is_panic(ValueError("PanicException"))
    assert not is_panic(KeyboardInterrupt())
