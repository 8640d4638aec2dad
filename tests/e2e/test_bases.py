"""A Qwen2.5-VL of two layers goes from faces to a served answer by its own profile, at the sizes of `ci`; the server
that a person released answers as transformers does (`make test-families`, minutes)."""

import base64
import json
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForImageTextToText

from facemllm.model.families.opening import open_processor
from tests.e2e.conftest import Project
from tests.families import SIDES, small

pytestmark = pytest.mark.families
FAMILY, PROFILE = "qwen2_5_vl", "qwen-vl-3b"
OF_CI = ("ingest", "validate", "evaluate", "promote", "serve")
"""Sections of the `ci` profile that make a run small and its gate wide."""
FEW = ("steps=2", "batch_images=4")
LONGEST = 32  # `evaluate.max_new_tokens` of `ci`


def leaves(values: Mapping[str, Any], before: str) -> Iterator[str]:
    for name, value in values.items():
        key = f"{before}.{json.dumps(name) if '.' in name else name}"
        if isinstance(value, Mapping):
            yield from leaves(value, key)
        else:
            yield f"{key}={json.dumps(value)}"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    folder = tmp_path_factory.mktemp("bases")
    ci = yaml.safe_load(Path("profiles/ci.yaml").read_text("utf-8"))
    del ci["promote"]["model_name"]
    sets = [text for section in OF_CI for text in leaves(ci[section], section)]
    sets += [f"model.base={json.dumps(str(small(FAMILY, folder / 'base')))}"]
    sets += [f"{section}.image_size={SIDES[FAMILY]}" for section in ("ingest", "model")]
    sets += ["train.use_gpu=false", "train.precision=fp32"]
    sets += [f"serve.policy.allowed.{task}=drawn heads" for task in ("gender", "age", "expression")]
    sets += [f"train.stages.{stage}.{few}" for stage in ("align", "instruct", "specialize") for few in FEW]
    project = Project(folder, *sets, profile=PROFILE)
    yield project
    project.facemllm("services", "down")


def ask(url: str, body: Any) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def test_from_faces_to_a_released_answer(project: Project) -> None:
    first = project.run("first")
    states = {step["name"]: step["state"] for step in first["steps"]}
    assert states.pop("release") == "skipped"
    assert set(states.values()) == {"done"}
    done = project.facemllm("promote", "approve", "1", "--by", "Ada Lovelace", "--reason", "figures are in order")
    assert done.returncode == 0, done.stderr
    released = project.run("first")
    digests = {step["name"]: step.get("digest") for step in released["steps"]}
    store = project.home / "home" / "store"
    face = next((store / digests["evaluate"] / "samples").glob("*.jpg"))
    picture, question = base64.b64encode(face.read_bytes()).decode(), "Describe the face."
    asked = {"instances": [{"image": {"b64": picture}, "question": "Is the person wearing a hat?"}]}
    server = released["endpoint"].partition("/v1/")[0]
    closed = ask(released["endpoint"], asked)["predictions"][0]
    assert closed["answer"] == max(closed["scores"], key=closed["scores"].get)
    url = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{picture}"}}
    content = [url, {"type": "text", "text": question}]
    chat = {"model": released["model"]["name"], "messages": [{"role": "user", "content": content}]}
    written = ask(f"{server}/v1/chat/completions", chat)["choices"][0]["message"]["content"]

    folder = store / released["model"]["digest"]
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), open_processor(folder)
    words = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
        add_generation_prompt=True,
        tokenize=False,
    )
    side = SIDES[FAMILY]
    shown = Image.open(face).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    inputs = processor(images=[[shown]], text=[words], return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert written == processor.decode(ids, skip_special_tokens=True).strip()
    lineage = project.facemllm("lineage", "1", "--json")
    assert lineage.returncode == 0, lineage.stderr
    assert digests["align"] in lineage.stdout
