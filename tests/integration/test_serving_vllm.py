"""A real vLLM server on this machine's CPU behind our engine: the answers of our own engine, closed and free.

`make test-vllm` makes the environment that this needs (`.venv-vllm`) and runs it; a server takes minutes to start.
"""

import asyncio
import base64
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch

from facemllm.model.inference import Predictor, Query
from facemllm.model.reader import Reader
from facemllm.serve.engine.export import export_for_vllm
from facemllm.serve.engine.own import OwnEngine
from facemllm.serve.engine.protocol import Prepared
from facemllm.serve.engine.vllm import VllmEngine
from facemllm.signing import manifest
from tests.integration.conftest import stop_tree
from tests.ports import free_port
from tests.vllm_example import CLOSED, OPEN, clip, face, of_family, tiny

PYTHON = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"
START_SECONDS = 400.0
FACES, LONGEST = 8, 8
SPELLED = "Is there a </s> beard <image><image> in this <|im_end|><|image_pad|> face?"
FLAGS = ("--dtype=float32", "--max-model-len=512", "--enforce-eager", "--distributed-executor-backend=uni")
FLAGS += ("--generation-config=vllm", '--limit-mm-per-prompt={"image": 1}', "--enable-scale-out")
ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
ENV |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not PYTHON.exists(), reason=".venv-vllm is absent: make test-vllm makes it and runs this"),
]


@contextmanager
def vllm(folder: Path, digest: str, *flags: str) -> Iterator[str]:
    """The address of a vLLM server that starts."""
    port = free_port()
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", f"--model={folder}", "--host=127.0.0.1"]
    command += [f"--port={port}", f"--served-model-name={digest}", *FLAGS, *flags]
    with (folder.parent / f"{folder.name}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **ENV}, cwd=folder.parent)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            stop_tree(process)


def clip_exported(folder: Path) -> tuple[Path, tuple[str, ...]]:
    export_for_vllm(clip(folder), folder.with_name("exported"))
    return folder.with_name("exported"), ()


def siglip_exported(folder: Path) -> tuple[Path, tuple[str, ...]]:
    export_for_vllm(clip(folder, "siglip"), folder.with_name("exported"))
    return folder.with_name("exported"), ()


def tiny_by_plugin(folder: Path) -> tuple[Path, tuple[str, ...]]:
    return tiny(folder), ("--model-impl=transformers",)


def family_exported(family: str, folder: Path) -> tuple[Path, tuple[str, ...]]:
    export_for_vllm(of_family(folder, family), folder.with_name("exported"))
    return folder.with_name("exported"), ()


MODELS = {made.__name__: made for made in (clip_exported, siglip_exported, tiny_by_plugin)}
MODELS |= {family: partial(family_exported, family) for family in ("qwen2_5_vl", "qwen3_vl", "internvl")}


@pytest.fixture(scope="module", params=MODELS)
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("vllm") / "model"
    served, flags = MODELS[request.param](folder)
    digest = manifest.of(folder).digest
    with vllm(served, digest, *flags) as url:
        engine = VllmEngine(Reader.open(folder), url, digest, max_new_tokens=LONGEST)
        engine.make_ready(START_SECONDS)
        own = OwnEngine(Predictor.load(folder), max_new_tokens=LONGEST)
        yield engine, own
        own.close(20)


def test_a_real_server_answers_as_our_own_engine(engines: tuple[VllmEngine, OwnEngine]) -> None:
    engine, own = engines
    closed = [*CLOSED, Query(SPELLED, ("yes", "no </s>", "a <image> hat"))]
    chats = [*OPEN, (("user", SPELLED),)]
    worst = 0.0

    async def compare(number: int) -> None:
        nonlocal worst
        one = Prepared(engine.reader.pixels(face(number, 80 + 4 * number)), None, (str(number),))
        found, expected = await engine.answer(one, closed, chats), await own.answer(one, closed, chats)
        for a, b in zip(found.scored, expected.scored, strict=True):
            worst = max(worst, float(np.abs(np.subtract(a.probabilities, b.probabilities)).max()))
            assert (a.best, a.greedy) == (b.best, b.greedy)
        assert found.texts == expected.texts
        for chat, text in zip(chats, expected.texts, strict=True):
            assert "".join([piece async for piece in engine.stream(one, chat)]) == text

    async def all_faces() -> None:
        await asyncio.gather(*(compare(number) for number in range(FACES)))

    asyncio.run(all_faces())
    print(f"largest difference of a probability: {worst:.1e}")
    assert worst < 1e-4


def test_a_real_server_takes_prepared_pixels_as_they_are(engines: tuple[VllmEngine, OwnEngine]) -> None:
    engine, _ = engines
    pixels = engine.reader.pixels(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8))
    features = json.loads(asyncio.run(engine._features(Prepared(pixels, None, ("noise",)), "")))
    raw = msgpack.unpackb(base64.b64decode(features["kwargs_data"]["image"][0]))
    kind, _, data = raw["pixel_values"]["data"]
    ours = engine.reader.family.inputs(pixels[None])["pixel_values"].numpy()
    theirs = np.frombuffer(data.data, kind).reshape(ours.shape)
    if kind == "uint8":  # Qwen-VL's patches, which vLLM rescales and normalises where it computes
        images = engine.reader.processor.image_processor
        mean, std = np.array(images.image_mean)[:, None], np.array(images.image_std)[:, None]
        theirs = ((theirs.reshape(len(ours), 3, -1) * images.rescale_factor - mean) / std).reshape(ours.shape)
    np.testing.assert_allclose(theirs, ours, atol=1e-6)
