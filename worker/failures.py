"""DataFusion's errors, told apart by what they say: their types are two, one for errors and one for panics."""

import re

from worker.errors import (
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

_PANIC_TYPES = frozenset({"PanicException", "RustPanic"})
# How the panic of a task that an operator has spawned looks like when that passes it on as an error.
_PANIC_ELSEWHERE = re.compile(r"panicked with message|JoinError::Panic\(")
# What asynchronous reads say of every panic, since they lose its message (pyo3-async-runtimes).
_NO_MESSAGE = "rust future panicked: unknown error"

# How an error of a Python function looks in the text of DataFusion's. Its traceback shows the worker's own files.
_PYTHON_ERROR = re.compile(
    r'PyErr \{ type: .+?, value: (.+?), traceback: (?:None|Some\("(?:[^"\\]|\\.)*"\)) \}', re.DOTALL
)
# Signatures stand in the queries of URLs, passwords in front of their hosts, and what a store answers may repeat what
# it was sent: of S3's answers two elements are about the error alone.
_URL_SECRETS = re.compile(r"(https?://)(?:[^/\s@]*@)?([^\s?#]*)(?:\?\S*)?")
_STORE_ANSWER = re.compile(r"(status code: \d+ [^:\n]*): (.*)", re.DOTALL)
_S3_ELEMENTS = re.compile(r"<(?:Code|Message)>([^<]*)</")

# DataFusion passes an error on with its own name, and those of the libraries it came through, in front. What comes
# after the names may be anything, the values of a row too. (Possessive, so that no text takes long.)
_OUTER_NAMES = r"^(?:(?:DataFusion|Arrow|External|Shared) error: |[^\n]*\ncaused by\n)*+"
_NAMES = (
    r"^(?:(?:DataFusion|Parquet|Arrow|External|Shared|Io|IO) error: |Parquet argument error: |External: "
    r"|Failed to fetch metadata for file [^\n]*?: (?=[A-Z])|[^\n]*\ncaused by\n)*+"
)
_STORE = _NAMES + r"Object Store error: "

# What functions of DataFusion's say of values that they cannot do with. The engine's own failures have the same name in
# front, so that these are told by what they say; what a Python function raised has its class there.
_OF_VALUES = (
    r"Execution error: (?:"
    + "|".join(
        (
            r"Overflow happened on FACTORIAL|factorial of a negative number",
            r"invalid Unicode scalar value: ",
            r"(?:Month|Day|Hour|Minute|Second) value '[^']*' is out of range|Unable to parse (?:date|time) from ",
            r"Error parsing timestamp from |Cannot cast Timestamp\(",
            r"DATE_BIN stride must be |Date part '[^']*' not supported|Unsupported date_trunc granularity",
            r"Failed to decode from (?:hex|base64)",
            r"\w+ got invalid (?:index|stride): |start_from out of bounds: ",
            r"negative count not allowed: |field position must not be zero|overlay start position must be ",
            r"string size overflow on |[lr]pad requested length |byte array offset overflow: ",
            r"array_repeat: offset \d+ exceeds |array_resize: resulting array of |Range too large to materialize: ",
            r"step can't be 0 for |Interval argument to \w+ must not be 0",
            r"map key (?:must be unique|cannot be null)",
            r"Scalar subquery returned more than one row",
        )
    )
    + ")"
)

# Which error a text is of, by the first that matches. The texts are those of DataFusion 55, object_store 0.13 and
# arrow 59, whose types do not get through to Python.
_KINDS: tuple[tuple[re.Pattern[str], type[WorkerError]], ...] = tuple(
    (re.compile(pattern, re.DOTALL), kind)
    for pattern, kind in (
        (r"Resources exhausted: |spilling process has exceeded the allowable limit", ResourcesExhausted),
        (r"No space left on device \(os error 28\)|Disk quota exceeded \(os error 122\)", ResourcesExhausted),
        (_STORE + r"Object at location .* not found: ", SourceNotFound),
        (_STORE + r".*\(os error 2\)", SourceNotFound),
        (_STORE + r"The operation lacked (?:the necessary privileges|valid authentication)", SourceDenied),
        (_STORE + r".*(?:\(os error (?:1|13)\)|status code: 40[013] |incorrectly configured region)", SourceDenied),
        # The file is shorter than it was, another, or none.
        (_STORE + r".*(?:Requested range was invalid|status code: 416 |precondition failure for )", SourceCorrupt),
        (_STORE + r".*\(os error 21\)", SourceCorrupt),
        (_STORE, SourceFailed),
        (_OUTER_NAMES + r"Parquet (?:argument )?error: ", SourceCorrupt),
        (_NAMES + r"(?:(?:Csv|Json|Ipc|Avro) error: |Parser error: Error while parsing value )", SourceCorrupt),
        (_NAMES + r"(?:Divide by zero error|(?:Cast|Compute|Parser) error: |Arithmetic overflow: )", ComputationFailed),
        (_NAMES + r"Invalid argument error: \S+ is too (?:large|small) to store in a Decimal", ComputationFailed),
        (_NAMES + r"Invalid argument error: Encountered non UTF-8 data: ", ComputationFailed),
        (_NAMES + _OF_VALUES, ComputationFailed),
        (_NAMES + r"regex parse error:", ComputationFailed),
    )
)


def without_url_secrets(said: str) -> str:
    """The text with its URLs of ``http`` and ``https`` as far as they are no secret."""
    return _URL_SECRETS.sub(r"\1\2", said)


def is_panic(error: BaseException) -> bool:
    """Whether this is a Rust panic: one of two types, neither of which can be imported, one no ``Exception``."""
    return type(error).__name__ in _PANIC_TYPES


def failure(error: BaseException) -> WorkerError:
    """The worker's error for what DataFusion raised while it executed a plan.

    The place of a panic is in none of them: Rust's panic hook writes it to the standard error, before Python gets to
    know. A supervisor reads it there.
    """
    said = text(error)
    if is_panic(error) or _PANIC_ELSEWHERE.search(said):
        return EnginePanicked(f"DataFusion panicked while it executed the plan: {said}")
    for pattern, kind in _KINDS:
        if pattern.search(said):
            return kind(said)
    return ExecutionFailed(said)


def text(error: BaseException) -> str:
    """What DataFusion says, without tracebacks of Python functions, secrets, and its invitation to report bugs."""
    said = str(error).partition("\nThis issue was likely caused by a bug in DataFusion")[0]
    if said == _NO_MESSAGE:
        return "the worker's log says more, in the lines with 'panicked at'"
    said = _PYTHON_ERROR.sub(r"\1", said)
    said = _STORE_ANSWER.sub(_without_answer, said)
    return without_url_secrets(said) or type(error).__name__


def _without_answer(found: re.Match[str]) -> str:
    elements = _S3_ELEMENTS.findall(found[2])
    return ": ".join((found[1], *elements))
