"""Where files may be kept outside this machine: a folder, or S3."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from facemllm.errors import UserError, one_line

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

_ANSWER_S, _CONNECT_S = 60.0, 10.0  # its own are 3 s and 1 s, in which a busy store has not taken a part


def path_of(place: str, key: str) -> str:
    """The path of a folder, or that in S3 (`bucket/prefix`). Raises UserError, naming the setting `key`, for another
    scheme."""
    scheme, found, path = place.partition("://")
    if not found:
        return place
    if scheme != "s3" or not path.strip("/"):
        raise UserError(f"{key}: {place} is neither a folder nor s3://bucket/prefix; give one of both")
    return path


def filesystem(place: str, key: str = "train.storage") -> tuple[FileSystem, str]:
    """The file system of a folder or an s3:// address, and the path there. S3's address, keys and region come from the
    environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_REGION...). Raises UserError as `path_of`."""
    from pyarrow import fs

    path = path_of(place, key)
    if "://" not in place:
        return fs.LocalFileSystem(), path
    options: dict[str, Any] = {"request_timeout": _ANSWER_S, "connect_timeout": _CONNECT_S}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        options |= zip(("scheme", "endpoint_override"), endpoint.rstrip("/").split("://", 1), strict=True)
    if region := os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
        options["region"] = region
    return fs.S3FileSystem(**options), path


@contextmanager
def reached(what: str, hint: str) -> Iterator[None]:
    """Raises UserError, naming `what` is kept and asking `hint`, where a folder or a store fails in the block."""
    from pyarrow import ArrowException

    try:
        yield
    except (OSError, ArrowException) as error:
        raise UserError(f"{what}: {one_line(error)}; {hint}") from error
