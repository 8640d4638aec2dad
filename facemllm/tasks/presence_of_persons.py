"""What the lists of CelebA, MAAD-Face and LFWA say of persons rather than of faces: sex, origin, and looks as their
annotators judged them. Kept apart so that CelebA's mean over forty names can be formed where there is a reason to."""

from collections.abc import Mapping

from facemllm.tasks.base import Task
from facemllm.tasks.items import Words
from facemllm.tasks.presence import attribute_item

_WORDS: Mapping[str, Words] = {
    "Male": ("a male face", ("(?:a )?male(?: face| person)?", "(?:a )?man")),
    "Asian": ("an asian person", ("(?:an )?asian(?: (?:person|face|woman|man))?",)),
    "Black": ("a black person", ("(?:a )?black(?: (?:person|face|woman|man))?",)),
    "Indian": ("an indian person", ("(?:an )?indian(?: (?:person|face|woman|man))?",)),
    "White": ("a white person", ("(?:a )?(?:white|caucasian)(?: (?:person|face|woman|man))?",)),
    "Attractive": ("an attractive person", ("(?:an )?attractive(?: (?:person|face|woman|man))?",)),
    "Attractive_Man": ("an attractive man", ("(?:an )?attractive man",)),
    "Attractive_Woman": ("an attractive woman", ("(?:an )?attractive woman",)),
}

TASK = Task(
    name="presence_of_persons",
    metric="balanced_accuracy",
    items=tuple(attribute_item(name, words) for name, words in _WORDS.items()),
    use="comparison with published figures, and fairness; not for decisions about people",
    sensitive=True,
)
