"""Training without Ray: how its command ends, what a rank's job is made of, and what is not said."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from facemllm import settings
from facemllm.errors import UserError
from facemllm.model.tiny import build_tiny
from facemllm.settings import Trainable
from facemllm.train import alone, stages
from facemllm.train.job import Job


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

    monkeypatch.setattr(alone, "train_alone", fail)
    assert alone.main(["align", "table", "out"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(said)
    assert captured.err.count("\n") == 1


def test_a_job_is_what_the_settings_say():
    loaded = settings.load("laptop", ["train.precision=fp32", "train.row_tokens=99", "train.checkpoint_every=3"])
    job = Job.of(loaded, "instruct", "key", "cpu", rank=1, world=2, cache=Path("cache"))
    assert (job.name, job.key, job.stage, job.model) == ("instruct", "key", loaded.stages()["instruct"], loaded.model)
    assert (job.precision, job.row_tokens, job.checkpoint_every) == ("fp32", 99, 3)
    assert (job.lora, job.seed, job.divergence) == (loaded.train.lora, loaded.seed, loaded.train.divergence)
    assert job == replace(Job.of(loaded, "instruct", "key", "cpu"), rank=1, world=2, cache=Path("cache"))


def test_adapters_are_made_without_a_word_of_the_libraries():
    loaded = settings.load("laptop", ["model.image_size=32"])
    model, _ = build_tiny(loaded.model, ["a face"], ["yes"], 0)
    trains = Trainable.model_validate(dict.fromkeys(stages.MODULES, "frozen") | {"language": "lora"})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        stages.prepare(model, trains, loaded.train.lora)
    assert not [str(one.message) for one in said if issubclass(one.category, FutureWarning)]
