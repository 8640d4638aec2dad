"""What stands in front of a model: pictures to pixels, chats to token ids, token ids to text. No weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import GenerationConfig

from facemllm.errors import refusing
from facemllm.model.families import family_of
from facemllm.model.inputs import ImageLike
from facemllm.model.pretrained import load_processor, read_config


class Reader:
    """The processor and the chat template of a model directory, as every engine uses them. `prepared` is the shape
    (S, S, 3) of pixels as the model sees them."""

    def __init__(self, config: Any, processor: Any, generation_config: Any) -> None:
        self.config, self.processor, self.generation_config = config, processor, generation_config
        self.takes_maps: bool = getattr(config, "segmentation_config", None) is not None
        knows = getattr(config, "knowledge_config", None)
        self.characteristic_names: tuple[str, ...] = tuple(knows["names"]) if knows else ()
        self.family = family_of(config, processor)
        self.frame = self.family.frame
        self.prepared: tuple[int, int, int] = (self.family.side, self.family.side, 3)

    @classmethod
    def open(cls, model_dir: Path | str) -> Reader:
        """Of a model directory, whose weights are looked at but not loaded. Raises UserError if it is none."""
        folder = Path(model_dir)
        config = read_config(folder)
        with refusing(f"cannot load the model {folder}: generation_config.json"):
            own = (folder / "generation_config.json").exists()
            writing = GenerationConfig.from_pretrained(folder) if own else GenerationConfig.from_model_config(config)
        return Reader(config, load_processor(folder), writing)

    def pixels(self, image: ImageLike) -> NDArray[np.uint8]:
        """The image as the model sees it, (S, S, 3) uint8. Pixels of that shape are prepared already, and stay."""
        return self.family.pixels(image)

    def chat(self, turns: Sequence[tuple[str, str]]) -> list[int]:
        """Token ids of a chat, (role, text) by turns, from the prefix to where its answer begins. Raises ValueError."""
        ids = list(self.frame.prefix_ids)
        roles = [role for role, _ in turns]
        if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
            raise ValueError("messages must alternate user, assistant, ... and end with a user's question")
        for place, (role, text) in enumerate(turns):
            ids += self.frame.prompt(text, follows=place > 0) if role == "user" else self.frame.answer(text)
        return ids

    def rendered(self, image: ImageLike, turns: Sequence[tuple[str, str]]) -> list[int]:
        """Token ids of a chat as the processor renders it whole: those that another program makes of this directory.
        `chat` may have others, since it cuts the template where training does."""
        chat: Any = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
        chat[0]["content"].insert(0, {"type": "image"})
        text = self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        found = self.processor(images=self.pixels(image), text=text, add_special_tokens=False, return_tensors="np")
        return [int(token) for token in found["input_ids"][0]]

    def text(self, ids: Sequence[int]) -> str:
        """What generated token ids say."""
        return str(self.processor.tokenizer.decode(ids, skip_special_tokens=True)).strip()
