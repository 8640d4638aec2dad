"""What runs a cluster's parts for real is kept in a network namespace of its own (`make test-cluster`)."""

from pathlib import Path

import pytest

from tests.integration.conftest import mlflow_server  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    links = [line.split(":")[0].strip() for line in Path("/proc/net/dev").read_text().splitlines()[2:]]
    if links != ["lo"]:
        for item in items:
            item.add_marker(pytest.mark.skip(reason="Ray listens on every network there is: run `make test-cluster`"))
