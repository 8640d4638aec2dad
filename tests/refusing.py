"""What a call must refuse to do, in one line of a test."""

from collections.abc import Callable
from typing import Any

import pytest

from facemllm.errors import UserError


def refuses(match: str | None, act: Callable[..., Any], *args: Any, error: Any = UserError, **options: Any) -> str:
    """`act(*args, **options)` raises `error` with words that match a pattern, if one is given; the words."""
    with pytest.raises(error, match=match) as raised:
        act(*args, **options)
    return str(raised.value)
