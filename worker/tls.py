"""The certificate of a worker, and of those that it trusts, from files that may change while it runs."""

import ssl
from pathlib import Path
from typing import Any, NamedTuple, Self

import grpc

from worker.config import Settings, UnfitSettings
from worker.files import Reloaded


class _Pems(NamedTuple):
    key: bytes
    cert: bytes
    client_ca: bytes | None


class Certificates:
    """A certificate, its key, and who vouches for clients; read anew for the next connection when the files change."""

    def __init__(self, cert: Path, key: Path, client_ca: Path | None = None) -> None:
        """
        Args:
            cert: a PEM file of the certificate, followed by those that vouch for it.
            key: a PEM file of its key.
            client_ca: a PEM file of who vouches for clients, which have to show a certificate then.

        Raises:
            UnfitSettings: they are not PEM, or no pair.
            OSError: one of them cannot be read.
        """
        self._cert, self._key, self._client_ca = cert, key, client_ca
        files = [file for file in (cert, key, client_ca) if file is not None]
        self._pems = Reloaded("certificates", files, self._read)
        self._served = self._pems.current()
        self._shown: tuple[_Pems, grpc.ChannelCredentials] | None = None

    @classmethod
    def of(cls, settings: Settings) -> Self | None:
        """Those that the settings name, if any.

        Raises:
            UnfitSettings, OSError: as the constructor; or one is named without the other.
        """
        if settings.tls_cert and settings.tls_key:
            return cls(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
        if settings.tls_cert:
            raise UnfitSettings("--tls-cert (WORKER_TLS_CERT) needs the certificate's key: add --tls-key")
        if settings.tls_key or settings.tls_client_ca:
            name = "tls-key" if settings.tls_key else "tls-client-ca"
            raise UnfitSettings(f"--{name} is for TLS, which needs the worker's certificate: add --tls-cert")
        return None

    def server_credentials(self) -> grpc.ServerCredentials:
        """For ``add_secure_port`` of one server, whose later connections use what the files hold then."""
        # gRPC asks in each handshake, in threads of its own.
        return grpc.dynamic_ssl_server_credentials(
            _configuration(self._served), self._changed_configuration, self._client_ca is not None
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For channels to others who trust as this worker does: the same object until the files change."""
        pems = self._pems.current()
        if self._shown is None or self._shown[0] is not pems:
            self._shown = pems, grpc.ssl_channel_credentials(pems.client_ca, pems.key, pems.cert)
        return self._shown[1]

    def _changed_configuration(self) -> Any:  # None where nothing has changed, which the stubs do not know
        pems = self._pems.current()
        if pems is self._served:
            return None
        self._served = pems
        return _configuration(pems)

    def _read(self) -> _Pems:
        # First, because its errors name the file. gRPC would take anything, and fail in handshakes.
        pems = _Pems(
            self._key.read_bytes(), self._cert.read_bytes(), self._client_ca.read_bytes() if self._client_ca else None
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self._cert, self._key, password=_no_password)
        except (ssl.SSLError, ValueError) as error:
            raise UnfitSettings(
                f"{self._cert} and {self._key} are not a certificate and its key, both in PEM and not encrypted"
            ) from error
        if self._client_ca is not None:
            try:
                context.load_verify_locations(self._client_ca)
            except ssl.SSLError as error:
                raise UnfitSettings(f"{self._client_ca} has no certificate in PEM") from error
        return pems


def _configuration(pems: _Pems) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pems.key, pems.cert)], pems.client_ca)


def _no_password() -> str:
    """Instead of asking for one on the terminal."""
    raise ValueError("the key is encrypted")
