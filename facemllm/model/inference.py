"""Answers from a model directory: options scored by likelihood, text generated greedily. Evaluation and serving both
stand on this, so they answer alike.

All questions about a face share one image encoding and as few passes of the language model as fit: image tokens, then
every question as a block, then every option as a branch of its block (see `forward`). A family that takes no such rows
is asked one question at a time (see `unpacked`). A face's scores do not depend on what it is batched with. Where the
model takes maps of face parts, one may stand beside each image (`maps[i]`, None for none); other models look at none.
Shapes: B faces, N tokens of the prefix, L tokens of a row, K scored positions, P places that predict, V vocabulary, S
image side, A characteristics, F what is kept of an image token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facemllm.errors import UserError
from facemllm.model.branches import NO_MAP
from facemllm.model.face_mllm import VisualTokens
from facemllm.model.forward import PADDING, PREFIX, TRUNK, Layout, joined
from facemllm.model.inputs import ImageLike, MapLike, face_map
from facemllm.model.pretrained import load_model
from facemllm.model.reader import Reader
from facemllm.model.unpacked import Asked, Unpacked, token_likelihoods

Maps = Sequence[MapLike | None] | None

PASS_TOKENS = 512
"""Tokens after the image in one pass, about: attention costs their square, and no question sees another."""

KEPT_CHARS = 1200
"""Most characters of a query that is remembered as tokens; every task's have fewer."""


@dataclass(frozen=True)
class Query:
    """A closed question and the texts it may be answered with."""

    question: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Scored:
    """Answer to a query. `probabilities[o]` is the softmax over the options of the summed log-likelihood of option o's
    tokens and end token. `greedy` is the option that free greedy decoding would write, None if it would write something
    else."""

    probabilities: tuple[float, ...]
    greedy: int | None

    @property
    def best(self) -> int:
        """Index of the likeliest option."""
        return int(np.argmax(self.probabilities))


@dataclass(frozen=True)
class FaceScores:
    """What one pass finds of a face: the answer to each query, and the probability of each characteristic, by name, as
    the knowledge branch scores it; of a model without that branch, none."""

    answers: list[Scored]
    characteristics: dict[str, float]


class Predictor(Reader):
    """A model ready to answer; frozen, in evaluation mode, float32 on CPU and bfloat16 on GPU."""

    def __init__(self, model: Any, processor: Any, *, device: str = "cpu", batch_images: int = 32) -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device).eval().requires_grad_(False)
        super().__init__(model.config, processor, getattr(model, "generation_config", None))
        self.batch_images = batch_images
        self._kept = lru_cache(maxsize=4096)(self._make_layout)
        ids = np.array(self.frame.prefix_ids)
        none = np.empty(0, np.int64)
        trunk, places = np.full(len(ids), TRUNK), np.arange(len(ids))
        self._prefix = Layout(ids, np.full(len(ids), PREFIX), trunk, places, none, none, none, none)
        self.image_places = np.flatnonzero(ids == self.frame.image_token_id)
        self._width = int(model.config.get_text_config().hidden_size)
        self._unpacked = Unpacked(self.family, self.model)

    @classmethod
    def load(
        cls, model_dir: Path | str, device: str = "cpu", threads: int | None = None, image_size: int | None = None
    ) -> Predictor:
        """Load a model directory; `image_size` as of `load_model`. Raises UserError if it cannot be loaded."""
        if threads:
            torch.set_num_threads(threads)
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        model, processor = load_model(model_dir, device=device, dtype=dtype, image_size=image_size)
        return cls(model, processor, device=device)

    def map(self, source: MapLike | None) -> NDArray[np.uint8]:
        """A map as the model sees it, (S, S) uint8, `NO_MAP` everywhere for None; a prepared map stays as it is. Raises
        UserError for anything that is no map of the 19 classes."""
        if isinstance(source, np.ndarray) and (source == NO_MAP).all():
            source = None
        return face_map(source, self.processor.image_processor, getattr(self.processor, "withheld_classes", ()))

    def _inputs(self, images: Sequence[ImageLike]) -> dict[str, Tensor]:
        """What the model takes of pictures, in its precision."""
        found = self.family.inputs(self._tensor(np.stack([self.pixels(image) for image in images])))
        return {name: one.to(self.model.dtype) if one.is_floating_point() else one for name, one in found.items()}

    def _tensor(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(self.device)

    def _maps(self, maps: Maps) -> Tensor | None:
        """Maps (B, S, S), None where the model takes none or no face has one."""
        if not self.takes_maps or maps is None or all(one is None for one in maps):
            return None
        return self._tensor(np.stack([self.map(one) for one in maps]))

    @torch.inference_mode()
    def encode(self, images: Sequence[ImageLike], maps: Maps = None) -> VisualTokens:
        """The faces as the language model is given them, and the scores of their characteristics: one tower pass."""
        features_BNF = self.family.features(self.model, self._inputs(images))
        return self.family.visual(self.model, features_BNF, self._maps(maps))

    def _parts(self, count: int) -> list[slice]:
        return [slice(start, start + self.batch_images) for start in range(0, count, self.batch_images)]

    def score(
        self, images: Sequence[ImageLike], questions: Sequence[Sequence[Query]], maps: Maps = None
    ) -> list[list[Scored]]:
        """Score every option of every question of each image; `questions[i]` are asked about `images[i]`."""
        return [one.answers for one in self.score_faces(images, questions, maps)]

    @torch.inference_mode()
    def score_faces(
        self, images: Sequence[ImageLike], questions: Sequence[Sequence[Query]], maps: Maps = None
    ) -> list[FaceScores]:
        """`score`, and the characteristics of each face out of the same pass of the tower."""
        found: list[FaceScores] = []
        for part in self._parts(len(images)):
            passes = [self.passes(asked) for asked in questions[part]]
            found += self._score(images[part], passes, maps and maps[part])
        return found

    def _score(self, images: Sequence[ImageLike], passes: Sequence[Sequence[Layout]], maps: Maps) -> list[FaceScores]:
        if not any(passes) and not self.characteristic_names:
            return [FaceScores([], {}) for _ in images]
        visual = self.encode(images, maps)
        answers: list[list[Scored]] = [[] for _ in images]
        for number in range(max(map(len, passes))):
            rows = [row for row, own in enumerate(passes) if number < len(own)]
            found = self.score_rows(visual.flat_BNF[rows], [passes[row][number] for row in rows])
            for row, scored in zip(rows, found, strict=True):
                answers[row] += scored
        return [FaceScores(own, named) for own, named in zip(answers, self.characteristics(visual), strict=True)]

    def characteristics(self, visual: VisualTokens) -> list[dict[str, float]]:
        """The probability of each characteristic, by name, of each encoded face."""
        scores = (
            [()] * len(visual.tokens_BND) if visual.scores_BA is None else visual.scores_BA.double().sigmoid().tolist()
        )
        return [dict(zip(self.characteristic_names, row, strict=True)) for row in scores]

    @torch.inference_mode()
    def score_rows(self, flat_BNF: Tensor, layouts: Sequence[Layout]) -> list[list[Scored]]:
        """The queries of rows out of `passes`, each about the face at its place in `flat_BNF` (`VisualTokens`)."""
        visual = VisualTokens.of_flat(flat_BNF, self._width)
        if not self.family.packs:
            asked = [self._asked(layout) for layout in layouts]
            found = [self._unpacked.likelihoods(visual.rows([row]), own) for row, own in enumerate(asked)]
            return [read_scores(*one, layout) for one, layout in zip(found, layouts, strict=True)]
        lengths = np.array([len(layout.ids) for layout in layouts])
        places_L = np.arange(lengths.max())

        def padded(name: str) -> Tensor:
            own = [getattr(layout, name) for layout in layouts]
            return self._tensor(np.stack([np.pad(row, (0, len(places_L) - len(row))) for row in own]))

        states_BLD = self.family.packed(
            self.model,
            visual,
            padded("ids"),
            self._tensor(np.where(places_L < lengths[:, None], 0, PADDING)),
            padded("block"),
            padded("position"),
            self._tensor(np.add.outer(np.arange(len(layouts)) * len(places_L), self.image_places).ravel()),
            padded("branch"),
        ).unflatten(0, (len(layouts), -1))
        return [self._read(states_LD, layout) for states_LD, layout in zip(states_BLD, layouts, strict=True)]

    def _asked(self, layout: Layout) -> list[Asked]:
        """The questions of a row, and their options, as tokens."""
        trunk_L = layout.branch == TRUNK
        options = [one.tolist() for one in np.split(layout.token, np.flatnonzero(np.diff(layout.option)) + 1)]
        blocks = [layout.ids[trunk_L & (layout.block == block)].tolist() for block in range(len(layout.ends))]
        return [(ids, options[a:b]) for ids, (a, b) in zip(blocks, pairwise([0, *layout.ends.tolist()]), strict=True)]

    def passes(self, asked: Sequence[Query]) -> list[Layout]:
        """The questions of a face, in order, as few passes of at most `PASS_TOKENS` tokens (one question: any)."""
        passes: list[list[Layout]] = []
        room, longest = 0, self.family.longest
        for query in asked:
            layout = self._layout(query)
            if longest is not None and (tokens := self.tokens_of(query)) > longest:
                raise UserError(
                    f"a picture, the question {query.question[:80]!r} and an option of it are {tokens} tokens, and the "
                    f"model reads {longest} (max_position_embeddings)"
                )
            if room < len(layout.ids) or not passes:
                passes.append([])
                room = PASS_TOKENS
            passes[-1].append(layout)
            room -= len(layout.ids)
        return [joined([self._prefix, *layouts]) for layouts in passes]

    def tokens_of(self, query: Query) -> int:
        """Tokens that the model reads of a picture, a question and the longest of its options."""
        return int(self._layout(query).position.max()) + 1

    def _read(self, states_LD: Tensor, layout: Layout) -> list[Scored]:
        # many options are predicted from the same token: its logits are computed once
        places, place_K = np.unique(layout.at, return_inverse=True)
        logits_PV = self.family.logits(self.model, states_LD[self._tensor(places)])
        return read_scores(*token_likelihoods(logits_PV, place_K, layout.token), layout)

    def _layout(self, query: Query) -> Layout:
        # what strangers ask is kept, too, so what is kept has to be small
        short = len(query.question) + sum(map(len, query.options)) <= KEPT_CHARS
        return self._kept(query) if short else self._make_layout(query)

    def _make_layout(self, query: Query) -> Layout:
        if not query.options:
            raise ValueError(f"the question {query.question!r} has no options; use generate for open questions")
        prompt = self.frame.prompt(query.question)
        ids = list(prompt)
        branches = [TRUNK] * len(prompt)
        start = len(self.frame.prefix_ids)
        positions = list(range(start, start + len(prompt)))
        at: list[int] = []
        tokens: list[int] = []
        options: list[int] = []
        for option, text in enumerate(query.options):
            answer = self.frame.answer(text)
            at += [len(prompt) - 1, *range(len(ids), len(ids) + len(answer) - 1)]
            tokens += answer
            options += [option] * len(answer)
            ids += answer[:-1]
            branches += [TRUNK + 1 + option] * (len(answer) - 1)
            positions += range(start + len(prompt), start + len(prompt) + len(answer) - 1)
        columns = (ids, [0] * len(ids), branches, positions, at, tokens, options, [len(query.options)])
        return Layout(*(np.array(column, np.int64) for column in columns))

    def generate(
        self, image: ImageLike, question: str | Sequence[Mapping[str, Any]], max_new_tokens: int = 96, maps: Maps = None
    ) -> str:
        """Greedy answer to a question, or to the last user message of a chat about one image; `maps` holds its map."""
        turns = [("user", question)] if isinstance(question, str) else [(m["role"], _text(m)) for m in question]
        return self._generate([image], [self.chat(turns)], max_new_tokens, maps)[0]

    def generate_batch(
        self, images: Sequence[ImageLike], questions: Sequence[str], max_new_tokens: int = 96, maps: Maps = None
    ) -> list[str]:
        """Greedy answers, one question an image, in left-padded batches."""
        texts: list[str] = []
        for part in self._parts(len(images)):
            rows = [self.chat([("user", question)]) for question in questions[part]]
            texts += self._generate(images[part], rows, max_new_tokens, maps and maps[part])
        return texts

    @torch.inference_mode()
    def _generate(
        self, images: Sequence[ImageLike], rows: Sequence[list[int]], max_new_tokens: int, maps: Maps
    ) -> list[str]:
        tokenizer = self.processor.tokenizer
        longest = max(len(row) for row in rows)
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        ids_BL = torch.tensor([[padding] * (longest - len(row)) + row for row in rows], device=self.device)
        mask_BL = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self.device)
        segmentation = self._maps(maps)
        written_BL = self.model.generate(
            input_ids=ids_BL,
            attention_mask=mask_BL,
            **(self.family.beside(ids_BL) | self._inputs(images)),
            **({} if segmentation is None else {"segmentation": segmentation}),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=padding,
        )
        return [self.text(row) for row in written_BL[:, longest:].tolist()]


def read_scores(likelihood_K: NDArray[np.float64], expected_K: NDArray[np.bool_], layout: Layout) -> list[Scored]:
    """The answers to the queries of a row, from the log-likelihood of each scored token and whether it is the likeliest
    one at its place."""
    options = int(layout.ends.max(initial=0))
    total = np.bincount(layout.option, likelihood_K, minlength=options)
    greedy = np.bincount(layout.option, ~expected_K, minlength=options) == 0
    scored = []
    for first, end in pairwise([0, *layout.ends.tolist()]):
        relative = np.exp(total[first:end] - total[first:end].max())
        written = np.flatnonzero(greedy[first:end])
        probabilities = tuple(float(p) for p in relative / relative.sum())
        scored.append(Scored(probabilities, int(written[0]) if len(written) else None))
    return scored


def _text(message: Mapping[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(p["text"] for p in content if p["type"] == "text")
