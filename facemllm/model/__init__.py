"""The model: LLaVA layout, tiny preset or any LLaVA-family checkpoint; scoring and generation.

Importing this package registers the tiny preset's tower with transformers, so that `AutoModelForImageTextToText` and
`AutoProcessor` load what `save_model` wrote.
"""

from transformers import AutoConfig, AutoModel

from facemllm.model.tower import FaceTower, FaceTowerConfig

AutoConfig.register(FaceTowerConfig.model_type, FaceTowerConfig, exist_ok=True)
AutoModel.register(FaceTowerConfig, FaceTower, exist_ok=True)

__all__ = ["FaceTower", "FaceTowerConfig"]
