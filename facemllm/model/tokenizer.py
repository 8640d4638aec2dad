"""Word tokenizer of the `tiny` preset, built from the training split's text.

Every closed answer ("turned 25 degrees left", "brown hair") is one token, so that an option is scored in one position;
every other word of the text is one token too. Anything else a user may type is spelled in characters (`##` marks a
continuation), so there is never an unknown token. Text is lower-cased and reduced to printable ASCII.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, IMAGE, USER, ASSISTANT = "<pad>", "<s>", "</s>", "<image>", "<|user|>", "<|assistant|>"
SPECIAL = (PAD, BOS, EOS, IMAGE, USER, ASSISTANT)
_CHARACTERS = [chr(code) for code in range(0x21, 0x7F) if not chr(code).isupper()]
_PIECE = r"[a-z0-9'\-]{1,32}|[^\s]"  # a bounded word or one sign: spelling stays linear in the text's length

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is not string %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% endif %}{% endfor %}{% endif %}"
    "{{ '<|user|>' if message['role'] == 'user' else '<|assistant|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% if message['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _normalizer() -> normalizers.Normalizer:
    return normalizers.Sequence(
        [
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Replace(Regex(r"[^\x20-\x7e]"), "?"),
        ]
    )


def build_tokenizer(texts: Iterable[str], answers: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer for the words of `texts` with each of `answers` as one token. Its bytes depend on the sets alone."""
    normalizer = _normalizer()
    words: set[str] = set()
    for text in texts:
        words.update(re.findall(_PIECE, normalizer.normalize_str(text)))
    phrases: set[str] = set()
    for answer in answers:
        phrase = normalizer.normalize_str(answer).strip()
        words.update(re.findall(_PIECE, phrase))
        if phrase and not re.fullmatch(_PIECE, phrase):
            phrases.add(phrase)
    spelled = [*SPECIAL, *_CHARACTERS, *(f"##{character}" for character in _CHARACTERS)]
    vocabulary = {token: index for index, token in enumerate([*spelled, *sorted(words - set(spelled))])}
    # no unknown token can arise: every character left by the normalizer is in the vocabulary
    core = Tokenizer(models.WordPiece(vocabulary, unk_token=PAD, continuing_subword_prefix="##"))
    core.normalizer = normalizer
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(_PIECE), behavior="isolated")]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=True),
            *(decoders.Replace(f" {sign}", sign) for sign in (";", ":", ")", "%")),
        ]
    )
    core.add_tokens([AddedToken(p, single_word=True, normalized=True, special=False) for p in sorted(phrases)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[IMAGE, USER, ASSISTANT],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
