"""The model: LLaVA layout, tiny preset or any LLaVA-family checkpoint; scoring and generation.

Importing this package registers the tiny preset's tower with transformers, so that `AutoModelForImageTextToText` and
`AutoProcessor` load what `save_model` wrote.
"""

from transformers import AutoConfig, AutoModel
from transformers.utils import logging

from facemllm.model.tower import FaceTower, FaceTowerConfig

logging.disable_progress_bar()  # loading and saving have bars of their own, several a stage

AutoConfig.register(FaceTowerConfig.model_type, FaceTowerConfig, exist_ok=True)
AutoModel.register(FaceTowerConfig, FaceTower, exist_ok=True)

__all__ = ["FaceTower", "FaceTowerConfig"]
