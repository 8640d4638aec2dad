"""What a model is given, prepared in one way, so that training, evaluation and serving answer alike: images and maps of
face parts by one decoder, one resize, one normalisation, and chat messages as token ids.

Images go through the model's own image processor. A map (the 19 classes of CelebAMask-HQ) is cut and resized as its
image is. A class may be withheld: its pixels take the class of the nearest other pixel, so that a map does not show
what the questions leave out (`reformat.held_out`).

Messages go through the model's own chat template. It is rendered once with placeholders and split at them, so any
template whose image stands before the first question can be packed: `prefix` (up to and with the image tokens), then
per turn `before` + question + `between` + answer + `after`. Text from outside is stripped of special tokens first, so
it cannot forge a turn or an image.

Shapes: B batch, S image side in pixels; uint8 pixels are (B, S, S, 3), normalised ones (B, 3, S, S), a map (S, S)
uint8, `NO_MAP` everywhere if there is none.
"""

from __future__ import annotations

import io
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from facemllm.errors import UserError, refusing
from facemllm.model.branches import CLASSES, NO_MAP
from facemllm.model.template import render

MAX_PIXELS = 4096 * 4096
_MARKS = tuple(f"""Is {turn} a "beard" (or hat) < 3 & it's dûr, Yes?""" for turn in ("q1q", "a1a", "q2q", "a2a"))
"""What is said in the conversation that a template is cut by: it has to come out as it went in."""

ImageLike = Image.Image | bytes | NDArray[np.uint8]
MapLike = Image.Image | bytes | NDArray[np.uint8]


def face_pixels(image: ImageLike, image_processor: Any, *, nearest: bool = False) -> NDArray[np.uint8]:
    """Decode and resize one image: (S, S, 3) uint8 RGB, neither rescaled nor normalised. Resized with anti-aliasing,
    or, where values must not mix (`nearest`), by taking the nearest pixel."""
    options = {"resample": Image.Resampling.NEAREST} if nearest else {}
    image = _opened(image).convert("RGB")
    batch = image_processor(image, do_rescale=False, do_normalize=False, return_tensors="np", **options)
    pixels_CSS = np.asarray(batch["pixel_values"])[0]
    return np.ascontiguousarray(pixels_CSS.transpose(1, 2, 0).astype(np.uint8))


def square_pixels(image: ImageLike, side: int) -> NDArray[np.uint8]:
    """Decode one image, cut it to a square about its centre, resize it (bicubic): (side, side, 3) uint8 RGB."""
    image = _opened(image).convert("RGB")
    return np.asarray(ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC))


def _opened(image: ImageLike) -> Image.Image:
    if isinstance(image, bytes):
        return Image.open(io.BytesIO(image))
    return Image.fromarray(image) if isinstance(image, np.ndarray) else image


def normalise(pixels_BSSC: Tensor, image_processor: Any) -> Tensor:
    """Pixels on the scale 0..255, any dtype, to what the tower takes: (B, 3, S, S) float in channels-last memory."""
    mean_C = torch.tensor(image_processor.image_mean, device=pixels_BSSC.device)
    std_C = torch.tensor(image_processor.image_std, device=pixels_BSSC.device)
    scaled_BSSC = (pixels_BSSC.float() * image_processor.rescale_factor - mean_C) / std_C
    return scaled_BSSC.permute(0, 3, 1, 2)


def face_map(source: MapLike | None, image_processor: Any, withheld: Collection[int] = ()) -> NDArray[np.uint8]:
    """A map, PNG bytes or class numbers, at the model's size (S, S); None gives `NO_MAP` everywhere. Raises UserError
    for anything that is no greyscale map of the 19 classes."""
    if source is None:
        size = image_processor.crop_size or image_processor.size
        return np.full((size["height"], size["width"]), NO_MAP, np.uint8)
    classes_HW = _classes(source)
    if withheld:
        classes_HW = without(classes_HW, withheld)
    grey = Image.fromarray(classes_HW, "L").convert("RGB")
    return face_pixels(grey, image_processor, nearest=True)[..., 0].copy()


def without(classes_HW: NDArray[np.uint8], withheld: Collection[int]) -> NDArray[np.uint8]:
    """The map with every pixel of the withheld classes as its nearest other pixel; background if there is no other."""
    from scipy.ndimage import distance_transform_edt

    hidden_HW = np.isin(classes_HW, list(withheld))
    if not hidden_HW.any():
        return classes_HW
    if hidden_HW.all():
        return np.zeros_like(classes_HW)
    nearest = distance_transform_edt(hidden_HW, return_distances=False, return_indices=True)
    return np.asarray(classes_HW[tuple(nearest)])


def _classes(source: MapLike) -> NDArray[np.uint8]:
    if isinstance(source, bytes):
        try:
            with Image.open(io.BytesIO(source), formats=("PNG",)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UserError(f"the segmentation map has {image.width} x {image.height} pixels; too many")
                image.load()
                source = image
        except UserError:
            raise
        except Exception as error:  # damaged data can raise almost anything from a decoder
            raise UserError(f"the segmentation map is no readable PNG: {error}") from error
    if isinstance(source, Image.Image):
        if source.mode not in ("L", "P"):
            raise UserError(f"the segmentation map is a {source.mode} image; it has to hold class numbers (L or P)")
        source = np.asarray(source)
    if source.ndim != 2 or source.dtype != np.uint8 or source.max(initial=0) >= CLASSES:
        raise UserError(f"the segmentation map has to hold class numbers below {CLASSES}, one a pixel")
    return source


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
    lead: str = ""  # opens an answer, behind what `add_generation_prompt` writes

    @classmethod
    def cut(cls, processor: Any, image_token_id: int, placeholder: str, side: int = 8) -> Frame:
        """Cut the processor's chat template, which writes `placeholder` for a picture; what the processor makes of that
        for pictures of `side` pixels is part of the prefix. An answer begins where the template's generation prompt
        ends. Raises UserError when the template is missing, its image does not precede the first question, or the
        tokenizer has no end token."""
        tokenizer = processor.tokenizer
        turns = zip(("user", "assistant") * 2, _MARKS, strict=True)
        chat: Any = [{"role": role, "content": [{"type": "text", "text": mark}]} for role, mark in turns]
        chat[0]["content"].insert(0, {"type": "image"})
        text, opened = render(processor, [(chat, False), (chat[:1], True)])
        if not tokenizer.eos_token:
            raise UserError("the model's tokenizer has no end token (eos_token in tokenizer_config.json)")
        head, *pieces = re.split("|".join(map(re.escape, _MARKS)), text)
        if re.findall("|".join(map(re.escape, _MARKS)), text) != list(_MARKS):
            raise UserError("the model's chat template changes, repeats or leaves out what is said")
        between, middle, later, after = pieces
        prefix, found, before = head.rpartition(placeholder)
        if not found:
            raise UserError("the model's chat template puts the image after the question; it cannot be packed")
        # a token that was added as a special one, as parts' image token is, need not be among `all_special_tokens`
        added = {one.content for one in tokenizer.added_tokens_decoder.values() if one.special}
        specials = {*tokenizer.all_special_tokens, *added, placeholder}
        if ordinary := sorted(one for one in specials if not one.strip() or one.replace(" ", "").isalnum()):
            raise UserError(
                f"the model's tokenizer takes {ordinary[0]!r} for a special token (tokenizer.json), which is taken out "
                "of all that is said; make it an ordinary one"
            )
        special = _any_of(specials)
        end = tokenizer.eos_token
        if end not in after and (other := special.search(after)):  # a turn's end may be another than a text's
            end = other[0]
        after = after.split(end)[0] + end
        if middle.startswith(after):
            middle = middle[len(after) :]
        blank = Image.fromarray(np.zeros((side, side, 3), np.uint8))
        # a template that writes the start token itself gets no second one, as in `apply_chat_template`
        starts = tokenizer.bos_token is not None and prefix.startswith(tokenizer.bos_token)
        plain = {"add_special_tokens": False} if starts else {}
        ids = processor(images=[[blank]], text=[prefix + placeholder], return_tensors="np", **plain)["input_ids"][0]
        generated, lead = opened.partition(_MARKS[0])[2], ""
        if between.startswith(generated) and later.endswith(between[len(generated) :]):
            lead = between[len(generated) :]
            between, later = generated, later[: len(later) - len(lead)]
        return cls(
            tokenizer=tokenizer,
            prefix_ids=tuple(int(i) for i in ids),
            image_token_id=image_token_id,
            first=(before, between),
            later=(middle, later),
            after=after,
            special=special,
            lead=lead,
        )

    @property
    def end_id(self) -> int:
        """The token that ends an answer."""
        return self.ids(self.after)[-1]

    def prompt(self, question: str, *, follows: bool = False) -> list[int]:
        """Token ids from the end of the prefix (or of the previous answer) to where the answer begins."""
        before, between = self.later if follows else self.first
        return self.ids(before + self.clean(question) + between)

    def answer(self, text: str) -> list[int]:
        """Token ids of an answer and the end token, as they follow a prompt."""
        opening = self.first[1]
        alone = self.ids(opening)
        whole = self.ids(opening + self.lead + self.clean(text) + self.after)
        if whole[: len(alone)] == alone:
            return whole[len(alone) :]
        return self.ids(self.lead + self.clean(text) + self.after)

    def clean(self, text: str) -> str:
        """Text without special tokens, none of which is a space; a space stands where one was."""
        while self.special.search(text):
            text = self.special.sub(" ", text)
        return text

    def ids(self, text: str) -> list[int]:
        """Token ids of a piece of text, special tokens in it read as such."""
        with refusing("the model's tokenizer cannot read a text (tokenizer.json)"):
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _any_of(texts: Collection[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(one) for one in sorted(texts, key=lambda one: (-len(one), one))))
