from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # tests/tiny.py
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A tiny random Llama as a directory."""
    from tiny import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_pair(tiny, tmp_path_factory) -> tuple[Path, Path]:
    """Two models, so that affinity has something to keep apart."""
    from tiny import make_tiny_model

    return tiny, make_tiny_model(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory):
    """Digests and artefacts of tests stay out of the user's cache."""
    os.environ["COMPTRUST_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["COMPTRUST_CACHE"]


@pytest.fixture
def bucket(monkeypatch) -> Iterator[str]:
    """URI of a folder in a local S3 server."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    name = f"sweeps-{uuid.uuid4().hex[:8]}"  # servers of one process share their content
    boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1").create_bucket(Bucket=name)
    yield f"s3://{name}/run?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    server.stop()
