"""Writing a model directory: safetensors, processor and chat template, whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from facemllm.core.files import partial_folder, publish
from facemllm.model.adapters import FOLDER, Adapter, write_adapter


def save_model(model: Any, processor: Any, out_dir: Path, adapter: Adapter | None = None) -> None:
    """Write model and processor to `out_dir`, which must not exist. Adapters must have been merged before.

    `adapter` is what was merged; it goes into a folder of its own, where nothing looks that loads the model.
    """
    if any(".lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("the model still holds adapters; merge them before saving")
    partial = partial_folder(out_dir)
    try:
        model = model.to("cpu", memory_format=torch.contiguous_format)
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        if adapter is not None:
            write_adapter(adapter, partial / FOLDER)
        publish(partial, out_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
