"""What a device has to do beside being fast, shown on a small Qwen2.5-VL: collectives, checkpoint and resume,
evaluation and serving. Raises AssertionError where it does not."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from training_shapes import SHAPES, build, read_processor, write_processor

_FEW = ("steps=4", "batch_images=4")


def check(folder: Path, table: Path, device: str) -> dict[str, str]:
    """What was done, and how it was seen."""
    base = _base(folder / "base", table)
    found = {"collectives": _collectives(device)}
    trained, found["checkpoint and resume"] = _resumed(folder, table, base, device)
    return found | {"evaluation and serving": _answers(trained, table, device)}


def _base(folder: Path, table: Path) -> Path:
    from facemllm.tables import CONVERSATIONS, open_table
    from facemllm.train.data import read_turns, vocabulary_texts

    write_processor(SHAPES["qwen-dry"], vocabulary_texts(read_turns(open_table(table, CONVERSATIONS), "train")), folder)
    build(SHAPES["qwen-dry"], read_processor(folder), 0).to("cpu").save_pretrained(folder)
    return folder


def _collectives(device: str) -> str:
    import torch
    import torch.distributed as dist

    kind = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(kind, store=dist.HashStore(), rank=0, world_size=1)
    value = torch.arange(4.0, device=device)
    dist.all_reduce(value)
    gathered = [torch.empty_like(value)]
    dist.all_gather(gathered, value)
    dist.destroy_process_group()
    assert gathered[0].tolist() == [0.0, 1.0, 2.0, 3.0]
    return f"all_reduce and all_gather by {kind}, one rank"


def _resumed(folder: Path, table: Path, base: Path, device: str) -> tuple[Path, str]:
    """The stage `instruct` of the profile, whole and stopped at half; the two models' largest difference."""
    from safetensors.torch import load_file

    from facemllm.settings import load
    from facemllm.train.stage import prepare_run
    from facemllm.train.worker import train_worker

    sets = [f"model.base={json.dumps(str(base))}", f"model.image_size={SHAPES['qwen-dry']['side']}"]
    sets += [f"train.use_gpu={str(device == 'cuda').lower()}", "train.checkpoint_every=2"]
    sets += ["train.recompute=false", *(["train.threads=1"] if device == "cpu" else [])]
    sets += [f"train.stages.instruct.{few}" for few in _FEW]
    chosen = load("qwen-vl-3b", sets)

    def train(name: str, stop: bool = False) -> Any:
        def log(step: int, metrics: dict[str, float]) -> None:
            if stop and step >= 2:
                raise KeyboardInterrupt

        out, work = folder / f"{name}-model", folder / f"{name}-work"
        return train_worker(prepare_run("instruct", chosen, table, None, out, work, folder / "cache"), log)

    train("whole")
    with suppress(KeyboardInterrupt):
        train("stopped", stop=True)
    result = train("stopped")
    assert result.resumed_from == 2, result
    one, other = (load_file(folder / f"{name}-model" / "model.safetensors") for name in ("whole", "stopped"))
    off = max(float((one[name].float() - other[name].float()).abs().max()) for name in one)
    assert off < 1e-3, off
    return folder / "whole-model", f"4 steps, bf16, gone on with from step 2: weights differ by {off:.1e} at most"


def _furthest(first: Any, second: Any) -> float:
    """Largest difference between probabilities of options."""
    pairs = zip(first, second, strict=True)
    return max(abs(a - b) for one, other in pairs for a, b in zip(one.probabilities, other.probabilities, strict=True))


def _answers(model_dir: Path, table: Path, device: str) -> str:
    """A picture's questions on the CPU in float32, on the device, and through the server's engine there."""
    import numpy as np

    from facemllm.model.inference import Predictor, Query
    from facemllm.serve.engine.own import OwnEngine
    from facemllm.serve.engine.protocol import Prepared

    queries = [Query("Is the person wearing a hat?", ("yes", "no")), Query("Which hair color?", ("red", "brown"))]
    picture = np.random.default_rng(0).integers(0, 255, Predictor.load(model_dir).prepared, np.uint8)
    (wanted,) = Predictor.load(model_dir).score([picture], [queries])
    engine = OwnEngine.load(model_dir, device=device, max_new_tokens=8)
    (found,) = engine.predictor.score([picture], [queries])
    said = asyncio.run(engine.answer(Prepared(picture, None, ("face",)), queries, [[("user", "Describe the face.")]]))
    engine.close()
    off, served = _furthest(wanted, found), _furthest(found, said.scored)
    assert max(off, served) < 0.05, (off, served)
    return (
        f"options within {off:.1e} of float32 on the CPU, served within {served:.1e}; wrote {len(said.texts[0])} signs"
    )
