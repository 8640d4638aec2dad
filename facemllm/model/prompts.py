"""From chat messages to token ids, through the model's own chat template, cut where packing needs the cuts.

The template is rendered once with placeholders and split at them, so any template whose image stands before the first
question can be packed: `prefix` (up to and with the image tokens), then per turn `before` + question + `between` +
answer + `after`. Text from outside is stripped of special tokens first, so it cannot forge a turn or an image.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from facemllm.errors import UserError

_Q1, _A1, _Q2, _A2 = "qplaceholder1q", "aplaceholder1a", "qplaceholder2q", "aplaceholder2a"


@dataclass(frozen=True)
class Frame:
    """A chat template cut into pieces, and the tokenizer that reads them."""

    tokenizer: Any
    prefix_ids: tuple[int, ...]
    image_token_id: int
    first: tuple[str, str]  # before and after the first question
    later: tuple[str, str]  # before and after every further question
    after: str  # closes an answer, ends with the end token
    special: re.Pattern[str]

    @classmethod
    def of(cls, model: Any, processor: Any) -> Frame:
        """Cut the processor's chat template. Raises UserError when its image does not precede the first question."""
        tokenizer = processor.tokenizer
        parts = [_user(_Q1, image=True), _assistant(_A1), _user(_Q2), _assistant(_A2)]
        try:
            text = processor.apply_chat_template(parts, tokenize=False)
            head, between, middle, later, after = re.split("|".join((_Q1, _A1, _Q2, _A2)), text)
        except Exception as error:
            raise UserError(f"the model's chat template cannot render a conversation: {error}") from error
        token = processor.image_token
        prefix, found, before = head.rpartition(token)
        if not found:
            raise UserError("the model's chat template puts the image after the question; it cannot be packed")
        end = tokenizer.eos_token
        after = after.split(end)[0] + end
        if middle.startswith(after):
            middle = middle[len(after) :]
        blank = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
        ids = processor(images=blank, text=prefix + token, return_tensors="np")["input_ids"][0]
        return cls(
            tokenizer=tokenizer,
            prefix_ids=tuple(int(i) for i in ids),
            image_token_id=int(model.config.image_token_id),
            first=(before, between),
            later=(middle, later),
            after=after,
            special=re.compile("|".join(re.escape(t) for t in sorted(tokenizer.all_special_tokens, key=len)[::-1])),
        )

    def prompt(self, question: str, *, follows: bool = False) -> list[int]:
        """Token ids from the end of the prefix (or of the previous answer) to where the answer begins."""
        before, between = self.later if follows else self.first
        return self._ids(before + self.clean(question) + between)

    def answer(self, text: str) -> list[int]:
        """Token ids of an answer and the end token, as they follow a prompt."""
        opening = self.first[1]
        alone = self._ids(opening)
        whole = self._ids(opening + self.clean(text) + self.after)
        if whole[: len(alone)] == alone:
            return whole[len(alone) :]
        return self._ids(self.clean(text) + self.after)

    def clean(self, text: str) -> str:
        """Text without special tokens; a space stands where one was."""
        while self.special.search(text):
            text = self.special.sub(" ", text)
        return text

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _user(text: str, *, image: bool = False) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image"}] if image else []
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def _assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}
