"""A stage trained by adapters, opened by plain transformers code: merged, and as an adapter on what it started from."""

import filecmp
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from facemllm import settings
from facemllm.model.face_mllm import Graph, extend
from facemllm.model.pretrained import adapter_of, load_model, save_model
from facemllm.model.tiny import build_tiny
from facemllm.settings.train import Trainable
from facemllm.train import optimizer
from tests.training_example import prompt
from tests.training_example import trains as modes

README = Path(__file__).parents[2] / "README.md"
TEXTS = ["Is there a beard?", "a woman with brown hair"]
KNOWS = "model.knowledge.enabled=true"
BRANCHES = {"projector": "full", "segmentation": "full", "knowledge": "full"}
CASES = {
    "plain": ([], {}),
    "projector": ([], {"projector": "full"}),
    "branches": (["model.segmentation.mode=append", KNOWS], BRANCHES),
    "all": (["model.segmentation.mode=add", KNOWS], BRANCHES | {"tower": "full", "embeddings": "full"}),
}


def inputs_of(processor, *, maps):
    generator = np.random.default_rng(0)
    face = Image.fromarray(generator.integers(0, 255, (100, 100, 3), dtype=np.uint8))
    more = {"segmentation": [generator.integers(0, 19, (50, 50), dtype=np.uint8)]} if maps else {}
    return processor(images=face, text=prompt(processor, TEXTS[0]), return_tensors="pt", **more)


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """`stage(case)`: base and outcome of a stage, as training leaves them; each case is trained once."""
    return cache(lambda case: trained(tmp_path_factory.mktemp(case), *CASES[case]))


def trained(folder, overrides, trains):
    """Base and outcome of a stage, with every declared weight moved."""
    chosen = settings.load("laptop", overrides)
    model, processor = build_tiny(chosen.model, TEXTS, ["yes", "no"], seed=1)
    graph = Graph(("beard", "hair"), ("with a beard", "brown hair"), np.array([[0.8, 0.2], [0.3, 0.7]]))
    model, processor = extend(model, processor, chosen.model, graph, (), seed=1)
    save_model(model, processor, folder / "base")
    model, processor = load_model(folder / "base")
    torch.manual_seed(2)
    trainable = Trainable(**modes(language="lora", **trains))
    wrapper = optimizer.set_trainable(model, trainable, chosen.train.lora, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        if "tower" in trains:
            for name, buffer in model.named_buffers():
                if "running" in name:
                    buffer.mul_(1.5)
    ids = torch.tensor([processor.tokenizer(TEXTS[0])["input_ids"]])
    adapter = adapter_of(wrapper, trainable)
    merged = optimizer.merge(model, wrapper, (ids, torch.ones_like(ids)))
    save_model(merged, processor, folder / "stage", adapter)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_merged_and_as_adapter_it_computes_the_same(case, stage):
    from peft import PeftModel

    folder = stage(case)
    inputs = inputs_of(AutoProcessor.from_pretrained(folder / "stage"), maps=bool(CASES[case][0]))
    base = AutoModelForImageTextToText.from_pretrained(folder / "base").eval()
    with torch.no_grad():
        before = base(**inputs).logits
        merged = AutoModelForImageTextToText.from_pretrained(folder / "stage").eval()(**inputs).logits
        adapted = PeftModel.from_pretrained(base, folder / "stage" / "adapter").eval()(**inputs).logits
    assert (merged - before).abs().max() > 0.01
    torch.testing.assert_close(adapted, merged, atol=2e-5, rtol=1e-4)
    names = {p.name for p in (folder / "stage" / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert not any(name.endswith((".bin", ".pt")) for name in names)


def test_equal_adapters_give_equal_bytes(stage, tmp_path):
    one, two = (folder / "stage" / "adapter" for folder in (stage("projector"), trained(tmp_path, *CASES["projector"])))
    same, differing, errors = filecmp.cmpfiles(one, two, [p.name for p in one.iterdir()], shallow=False)
    assert (differing, errors) == ([], [])
    assert len(same) >= 2


def test_the_readme_opens_it_merged_and_as_adapter(stage, monkeypatch, capsys):
    monkeypatch.chdir(stage("branches"))
    inputs = inputs_of(AutoProcessor.from_pretrained("stage"), maps=False)
    Image.new("RGB", (60, 60), "gray").save("face.jpg")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.S)
    merged_code, adapter_code = (block for block in blocks if "from_pretrained(" in block)
    names = {".facemllm/store/DIGEST": "stage", ".facemllm/store/BEFORE": "base"}
    scope, logits = {}, []
    for code in (merged_code, adapter_code):
        for name, folder in names.items():
            code = code.replace(name, folder)
        exec(code, scope)
        with torch.no_grad():
            logits.append(scope["model"].eval()(**inputs).logits)
    torch.testing.assert_close(logits[1], logits[0], atol=2e-5, rtol=1e-4)
    assert "is there a beard" in capsys.readouterr().out
