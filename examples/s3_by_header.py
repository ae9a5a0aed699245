"""A session builder that reads S3 with the credentials of the tenant that the header ``x-tenant`` names.

    cd examples
    S3_TENANTS=tenants.toml python -m worker --session-builder s3_by_header:build_state

``tenants.toml`` has a table for every tenant; ``endpoint`` is for stores other than Amazon's:

    [acme]
    bucket = "acme-data"
    region = "eu-central-1"
    access_key_id = "…"
    secret_access_key = "…"
    endpoint = "http://127.0.0.1:9000"

The header is believed. Put the worker behind a proxy that sets it, or check a token first, as ``own_server.py`` does.
Clients plan their queries with an object store, and credentials, of their own: none are in a plan.
"""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from datafusion import SessionContext
from datafusion.object_store import AmazonS3

from worker import PermissionDenied, WorkerQueryContext


@dataclass(frozen=True)
class Tenant:
    """Where a tenant's data is, and what opens it; without the keys, the store would take the worker's own."""

    bucket: str
    region: str
    access_key_id: str
    secret_access_key: str = field(repr=False)
    endpoint: str | None = None

    def object_store(self) -> AmazonS3:
        """The store, which connects when something is read."""
        return AmazonS3(
            bucket_name=self.bucket,
            region=self.region,
            access_key_id=self.access_key_id,
            secret_access_key=self.secret_access_key,
            endpoint=self.endpoint,
            allow_http=self.endpoint is not None and self.endpoint.startswith("http://"),
        )


def load_tenants(file: Path) -> Mapping[str, Tenant]:
    """The tenants of a TOML file, by name."""
    return {name: Tenant(**table) for name, table in tomllib.loads(file.read_text()).items()}


TENANTS = load_tenants(Path(os.environ["S3_TENANTS"]))


async def build_state(ctx: WorkerQueryContext) -> SessionContext:
    """A session that can read the tenant's bucket, and no other."""
    name = ctx.headers.get("x-tenant", "")
    tenant = TENANTS.get(name)
    if tenant is None:
        raise PermissionDenied(f"there is no tenant {name!r}: the header x-tenant must name one")
    ctx.principal = name
    return ctx.builder.with_object_store(f"s3://{tenant.bucket}", tenant.object_store()).build()
