"""Checkpoints by name: a folder first, else the hub, whose reasons are told whole."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from facemllm.core.hub import fetched
from facemllm.errors import UserError


def test_a_folder_is_taken_as_it_is(tmp_path):
    assert fetched(str(tmp_path), "model.base") == tmp_path.resolve()
    assert fetched("facemllm", "model.base") == Path("facemllm").resolve()


def test_the_reason_is_told_whole_and_the_setting_named(monkeypatch):
    reason = " ".join(["the hub says a lot"] * 40) + "; log in with `hf auth login`"

    def refuse(*_, **__):
        raise OSError(reason.replace("; ", ";\n"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError) as refused:
        fetched("nobody/nothing", "model.tower")
    said = str(refused.value)
    assert said == f"model.tower: nobody/nothing is no folder, nor a model of the hub: {reason}"
