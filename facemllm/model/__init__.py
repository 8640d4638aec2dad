"""The model: LLaVA layout, tiny preset or any LLaVA-family checkpoint; scoring and generation.

Importing this package registers the tiny preset's tower and `FaceMllmForConditionalGeneration` with transformers, so
that `AutoModelForImageTextToText` and `AutoProcessor` load what `save_model` wrote. `open_processor` needs no
torchvision, which `AutoProcessor` wants for families that also see videos; `family_of(config, processor).pixels` cuts a
picture as in training.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from facemllm.model.face_mllm import FaceMllmConfig, FaceMllmForConditionalGeneration, FaceMllmModel, FaceMllmProcessor
from facemllm.model.families import family_of
from facemllm.model.families.opening import open_processor
from facemllm.model.tiny import FaceTower, FaceTowerConfig

logging.disable_progress_bar()  # loading and saving have bars of their own, several a stage

AutoConfig.register(FaceTowerConfig.model_type, FaceTowerConfig, exist_ok=True)
AutoModel.register(FaceTowerConfig, FaceTower, exist_ok=True)
AutoConfig.register(FaceMllmConfig.model_type, FaceMllmConfig, exist_ok=True)
AutoModel.register(FaceMllmConfig, FaceMllmModel, exist_ok=True)
AutoModelForImageTextToText.register(FaceMllmConfig, FaceMllmForConditionalGeneration, exist_ok=True)
AutoProcessor.register(FaceMllmConfig, FaceMllmProcessor, exist_ok=True)

__all__ = ["family_of", "open_processor"]
