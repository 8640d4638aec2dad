"""Opening a processor, on machines without torchvision too.

Newer processors hold one for videos, which transformers has for torchvision alone; pictures are processed without. Such
a processor is opened with its settings for videos as they stand on disk, so that it is saved whole again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoConfig, AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name
from transformers.utils import is_torchvision_available

_LOCAL = {"local_files_only": True, "trust_remote_code": False}
_NAMES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
_OF_VIDEOS = "video_processor"


class UnopenedVideos(ImageProcessingMixin):
    """The settings of a processor of videos, which is not opened."""

    num_frames = fps = None
    model_input_names: ClassVar[list[str]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raises ImportError."""
        raise ImportError("videos need torchvision: pip install torchvision")

    def to_dict(self) -> dict[str, Any]:
        """The settings as they were read."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


def open_processor(folder: Path | str) -> Any:
    """The processor of a model directory, from local files and transformers' own classes alone."""
    folder = Path(folder)
    kind = None if is_torchvision_available() else _kind(folder)
    if kind is None or _OF_VIDEOS not in kind.get_attributes():
        return AutoProcessor.from_pretrained(folder, **_LOCAL)

    openers: dict[str, Any] = {"image_processor": AutoImageProcessor, "tokenizer": AutoTokenizer}
    openers["feature_extractor"] = AutoFeatureExtractor
    parts = [
        UnopenedVideos(**_video_settings(folder))
        if name == _OF_VIDEOS
        else openers[name].from_pretrained(folder, **_LOCAL)
        for name in kind.get_attributes()
    ]
    settings, _ = kind.get_processor_dict(folder, local_files_only=True)
    return without_videos(kind).from_args_and_dict(parts, settings)


def without_videos(kind: Any) -> Any:
    """A processor's class, of the same name, that takes `UnopenedVideos` for its processor of videos."""

    def check(self: Any, argument_name: str, argument: Any) -> Any:
        if argument_name == _OF_VIDEOS:
            return type(argument)
        return kind.check_argument_for_proper_class(self, argument_name, argument)

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})


def _kind(folder: Path) -> Any:
    """The class of a directory's processor; None where transformers has none by that name."""
    for name in _NAMES:
        if named := _read(folder / name).get("processor_class"):
            return processor_class_from_name(named)
    return PROCESSOR_MAPPING.get(type(AutoConfig.from_pretrained(folder, **_LOCAL)), None)


def _video_settings(folder: Path) -> dict[str, Any]:
    own = _read(folder / "processor_config.json").get(_OF_VIDEOS)
    return own or _read(folder / "video_preprocessor_config.json")


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text("utf-8")) if file.exists() else {}
