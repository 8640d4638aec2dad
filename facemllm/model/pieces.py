"""Pieces of words: learnt from the words of a text, for the tiny preset's tokenizer, and words spelled in them.

A piece that continues a word is marked `##`. Pieces are those of byte-pair encoding over the distinct words, each
counted once, so that what many words have in common is a piece, however often one of them is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from facemllm.core.digests import draw

CONTINUES = "##"
PIECES = 600
"""Most pieces that are learnt."""
_START = "\u2581"
_LONGEST = 8  # characters of a piece
_TWICE = 2


def learn(words: Iterable[str], characters: Sequence[str]) -> list[str]:
    """Pieces of at least two characters that at least two of the words share, in an order of their own. The same for
    the same set of words."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    alphabet = [_START, *characters]
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + PIECES,
        min_frequency=_TWICE,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        max_token_length=_LONGEST + 1,
        show_progress=False,
    )
    core.train_from_iterator((_START + word for word in sorted(set(words))), trainer)
    found = (
        piece[len(_START) :] if piece.startswith(_START) else CONTINUES + piece for piece in sorted(core.get_vocab())
    )
    return sorted(piece for piece in found if len(piece.removeprefix(CONTINUES)) >= _TWICE)


class Speller:
    """Spells words of token ids in smaller pieces, as a WordPiece tokenizer with `##` would an unknown word. Of other
    tokenizers it leaves every text as it is."""

    def __init__(self, tokenizer: Any) -> None:
        core = getattr(tokenizer, "backend_tokenizer", None)
        model = getattr(core, "model", None)
        knows = isinstance(model, models.WordPiece) and model.continuing_subword_prefix == CONTINUES
        added = set(core.get_added_tokens_decoder()) if core is not None else set()
        self._ids: dict[str, int] = tokenizer.get_vocab() if knows else {}
        self._words = {
            number: word
            for word, number in self._ids.items()
            if number not in added and len(word) > _TWICE and word.isalpha()
        }

    def spelled(self, ids: Sequence[int], share: float, *parts: str) -> list[int]:
        """The ids with about `share` of the words in pieces, which ones and how being drawn by a hash of `parts`."""
        found: list[int] = []
        for place, number in enumerate(ids):
            word = self._words.get(number)
            if word is None or draw(1000, *parts, str(place), "spell") >= 1000 * share:
                found.append(number)
            else:
                found += self._pieces(word, 1 + draw(len(word) - 1, *parts, str(place), "length"))
        return found

    def _pieces(self, word: str, longest: int) -> list[int]:
        """The word in pieces of at most so many characters, each the longest that is known."""
        found, start = [], 0
        while start < len(word):
            mark = CONTINUES if start else ""
            sizes = range(min(longest, len(word) - start), 0, -1)
            size = next(size for size in sizes if mark + word[start : start + size] in self._ids)
            found.append(self._ids[mark + word[start : start + size]])
            start += size
        return found
