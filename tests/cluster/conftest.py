"""What runs a cluster's parts for real is kept in a network namespace of its own (`make test-cluster`), but the image's
containers, which have one each."""

from pathlib import Path

import pytest

from tests.integration.conftest import mlflow_server  # noqa: F401

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    links = [line.split(":")[0].strip() for line in Path("/proc/net/dev").read_text().splitlines()[2:]]
    skip = pytest.mark.skip(reason="Ray listens on every network there is: run `make test-cluster`")
    for item in items:
        if links != ["lo"] and item.path.is_relative_to(HERE) and item.path.name != "test_image.py":
            item.add_marker(skip)
