"""Imports of a server that leave optional packages out."""

import sys
from importlib.util import find_spec

import pytest

from facemllm.serve.imports import without


def test_packages_look_absent_inside_and_are_there_afterwards() -> None:
    for name in ("wave", "wave.nothing"):
        sys.modules.pop(name, None)
    with without(("wave", "json", "no_such_package")):
        assert find_spec("wave") is None
        with pytest.raises(ImportError):
            import wave
        import json  # was there already

        assert json.loads("1") == 1
    import wave

    assert wave.open
    assert "no_such_package" not in sys.modules
