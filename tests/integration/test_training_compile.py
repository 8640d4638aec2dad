"""A compiled model computes the same losses and gradients, to the last bits of fp32."""

import shutil
from pathlib import Path

import pytest
import torch

from facemllm.train import optimizer
from tests.training_example import Toy, assert_same_gradients, stage, trains

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"),
]


def test_compiled_steps_are_the_plain_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a compilation that was killed leaves half a library in the common cache
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)  # others would each import torch first
    toy, plan = Toy(tmp_path), stage(trains=trains(projector="full", language="full"), batch_images=2)
    model, language = toy.model, toy.model.model.language_model
    language.layers, language.config.num_hidden_layers = language.layers[:1], 1  # all are compiled alike
    optimizer.set_trainable(model, plan.trains, toy.settings.train.lora, 0)
    optimizer.set_modes(model, plan.trains)
    batches = toy.batches(plan, compile=True)
    one, gradients = toy.gradients(model, plan, batches)
    with optimizer.memory_savings(model, plan.trains, recompute=False, compiled=True):
        other, again = toy.gradients(model, plan, batches)
    torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)
    assert_same_gradients(gradients, again, atol=1e-4)
