"""A worker that other machines reach needs TLS and a check of who asks, or to be told that it does not."""

import logging
from pathlib import Path

import pytest
from certificates import Authority
from test_server import refused

from worker import Settings, UnfitSettings, Worker
from worker.server import Server

EVERYWHERE = "0.0.0.0"
NO_TLS = "there is no TLS (--tls-cert and --tls-key)"
NO_CHECK = "there is no check of who asks (--auth-token-file, --tls-client-ca or a --session-builder)"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """What the settings of these names may be."""
    authority = Authority()
    cert, key = authority.issue("worker").write(tmp_path, "worker")
    ca, tokens = tmp_path / "ca.pem", tmp_path / "tokens"
    ca.write_bytes(authority.pem)
    tokens.write_text("ada:3f9c-5b21-77aa-0c4b\n")
    return {"tls_cert": cert, "tls_key": key, "tls_client_ca": ca, "auth_token_file": tokens}


async def serve(settings: Settings) -> None:
    """A server that would listen now."""
    async with Worker() as worker:
        Server(worker, settings)


@pytest.mark.parametrize(
    "host", [EVERYWHERE, "::", "192.0.2.1", "::ffff:192.0.2.1", "worker.example", "localhost.example", "0", "127.1", ""]
)
async def test_it_is_not_open_by_accident(host: str) -> None:
    with pytest.raises(UnfitSettings) as open_to_all:
        await serve(Settings(host=host))
    for word in (NO_TLS, NO_CHECK.removeprefix("there is "), "--insecure (WORKER_INSECURE=true)", "127.0.0.1"):
        assert word in str(open_to_all.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "LOCALHOST", "::1", "::ffff:127.0.0.1"])
async def test_one_for_this_machine_needs_nothing(host: str) -> None:
    await serve(Settings(host=host))


@pytest.mark.parametrize(
    ("names", "lacks"),
    [
        (["auth_token_file"], NO_TLS),
        (["tls_cert", "tls_key"], NO_CHECK),
        (["tls_cert", "tls_key", "auth_token_file"], None),
        (["tls_cert", "tls_key", "tls_client_ca"], None),
        (["tls_cert", "tls_key", "session_builder"], None),
        (["session_builder"], NO_TLS),
    ],
)
async def test_it_needs_both_and_is_told_what_it_lacks(
    names: list[str], lacks: str | None, files: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    values = files | {"session_builder": "mine:build_state"}
    settings = Settings.model_validate({"host": EVERYWHERE} | {name: values[name] for name in names})
    if lacks is None:
        await serve(settings)
        return
    with pytest.raises(UnfitSettings) as refusal:
        await serve(settings)
    assert lacks in str(refusal.value)
    assert str(refusal.value).count("there is") == 1

    await serve(settings.model_copy(update={"insecure": True}))
    assert lacks in caplog.text


async def test_the_command_refuses_before_it_listens(tmp_path: Path) -> None:
    text = await refused("--host", EVERYWHERE, folder=tmp_path)
    assert text.startswith("python -m worker: --host (WORKER_HOST): 0.0.0.0 is reached from other machines")
    assert "no TLS" in text
    assert "--insecure" in text
