"""Session builders by name: each way to fail has a message of its own."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from worker import SessionStateBuilder, WorkerQueryContext
from worker.headers import Headers
from worker.importer import ImportFailed, load_session_builder

WriteModule = Callable[[str, str], None]

GOOD = """
async def build(ctx):
    return ctx.builder.with_config_option("datafusion.execution.batch_size", 77).build()

class Builders:
    class Inner:
        @staticmethod
        def build(ctx):
            return ctx.builder.build()

class WithMethod:
    async def build_session_state(self, ctx):
        return ctx.builder.build()

with_method = WithMethod()
text = "SELECT 1"
"""


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WriteModule]:
    """Writes modules into the current folder, and forgets them and the folder after the test."""
    known = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in {"", str(tmp_path)}])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(name: str, text: str) -> None:
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)

    yield write
    for name in set(sys.modules) - known:
        del sys.modules[name]


@pytest.mark.parametrize("attribute", ["build", "Builders.Inner.build", "with_method"])
async def test_a_builder_is_found_in_the_current_folder(write_module: WriteModule, attribute: str) -> None:
    write_module("my_builders.py", GOOD)
    builder = load_session_builder(f"my_builders:{attribute}")
    session = await builder.build_session_state(WorkerQueryContext(SessionStateBuilder(), Headers()))
    assert f"datafusion.execution.batch_size = {77 if attribute == 'build' else 8192}\n" in repr(session)


def test_a_builder_is_found_in_a_package(write_module: WriteModule) -> None:
    write_module("my_package/__init__.py", "")
    write_module("my_package/workers.py", GOOD)
    load_session_builder("my_package.workers:build")
    assert "my_package.workers" in sys.modules


@pytest.mark.parametrize("name", ["", ":", "my_builders", "my_builders:", ":build", "my_builders.build"])
def test_a_name_of_another_form_is_refused_before_anything_is_imported(write_module: WriteModule, name: str) -> None:
    write_module("my_builders.py", "raise SystemExit")
    with pytest.raises(ImportFailed, match="is not of the form module:attr") as caught:
        load_session_builder(name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:build", "there is no module 'no_such_module'"),
        ("no_such_package.inner:build", "there is no module 'no_such_package'"),
        ("my_package.no_such_inner:build", "there is no module 'my_package.no_such_inner'"),
        ("my_builders.build:call", "there is no module 'my_builders.build'"),
        ("needs:build", "needs needs 'no_such_driver', which is missing"),
        ("my_package.needs:build", "my_package.needs needs 'no_such_driver.inner', which is missing"),
        ("raises:build", "importing raises failed with ZeroDivisionError: division by zero"),
        ("raises_import_error:build", "importing raises_import_error failed with ImportError: cannot import name"),
        ("broken:build", "importing broken failed with SyntaxError"),
        ("my_builders:bulid", "my_builders has no attribute 'bulid'"),
        ("my_builders:Builders.Outer.build", "my_builders has no attribute 'Builders.Outer.build'"),
        ("my_builders:build:more", "my_builders has no attribute 'build:more'"),
        ("my_builders:text", "'SELECT 1' is no session builder"),
        ("my_builders:WithMethod", "WithMethod.* is no session builder"),
        ("my_package:needs_nothing", "my_package has no attribute 'needs_nothing'"),
    ],
)
def test_each_failure_says_what_it_is(write_module: WriteModule, name: str, message: str) -> None:
    write_module("my_builders.py", GOOD)
    write_module("needs.py", "import no_such_driver")
    write_module("raises.py", "1 / 0")
    write_module("raises_import_error.py", "from my_builders import missing_name")
    write_module("broken.py", "def build(:")
    write_module("my_package/__init__.py", "")
    write_module("my_package/needs.py", "import no_such_driver_package\n")
    write_module("no_such_driver_package.py", "raise ModuleNotFoundError('no', name='no_such_driver.inner')")
    with pytest.raises(ImportFailed, match=message) as caught:
        load_session_builder(name)
    assert str(caught.value).startswith(f"session builder {name!r}")
    assert caught.value.__cause__ is not None


def test_a_module_that_a_module_of_a_similar_name_lacks_is_not_the_builders(write_module: WriteModule) -> None:
    write_module("build.py", "import builders")
    with pytest.raises(ImportFailed, match="build needs 'builders', which is missing"):
        load_session_builder("build:build")


def test_the_current_folder_is_searched_once_however_many_builders_there_are(
    write_module: WriteModule, tmp_path: Path
) -> None:
    write_module("my_builders.py", GOOD)
    load_session_builder("my_builders:build")
    load_session_builder("my_builders:build")
    assert sys.path.count(str(tmp_path)) == 1


def test_a_relative_name_is_refused(write_module: WriteModule) -> None:
    write_module("my_builders.py", GOOD)
    with pytest.raises(ImportFailed, match=r"importing \.my_builders failed with TypeError"):
        load_session_builder(".my_builders:build")
