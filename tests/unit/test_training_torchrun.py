"""Training without Ray: how its command ends."""

from __future__ import annotations

import pytest

from facemllm.errors import UserError
from facemllm.train import torchrun


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("no training stage 'polish'"), "error: no training stage 'polish'"),
        (FloatingPointError("the loss is nan"), "error: the loss is nan"),
        (PermissionError(13, "Permission denied", "/kept"), "error: Permission denied /kept; check the place and your"),
        (KeyboardInterrupt(), "error: interrupted; run the same command again to go on"),
    ],
)
def test_it_ends_with_one_line(error, said, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(torchrun, "train", fail)
    assert torchrun.main(["align", "table", "out"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(said)
    assert captured.err.count("\n") == 1
