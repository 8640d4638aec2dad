"""Facial expression by 135 names of emotions, for Emo135.

Its card says that the names come from a rating of English emotion terms; those are taken to be the 135 of Shaver,
Schwartz, Kirson and O'Connor, "Emotion knowledge", Journal of Personality and Social Psychology, 1987. How the dataset
spells them is unverified: a label that is none of these names gives no question.
"""

from facemllm.tasks.base import Row
from facemllm.tasks.expression import expression_task

_LOVE = (
    "adoration affection love fondness liking attraction caring tenderness compassion sentimentality arousal desire "
    "lust passion infatuation longing"
)
_JOY = (
    "amusement bliss cheerfulness gaiety glee jolliness joviality joy delight enjoyment gladness happiness jubilation "
    "elation satisfaction ecstasy euphoria enthusiasm zeal zest excitement thrill exhilaration contentment pleasure "
    "pride triumph eagerness hope optimism enthrallment rapture relief"
)
_SURPRISE = "amazement surprise astonishment"
_ANGER = (
    "aggravation irritation agitation annoyance grouchiness grumpiness exasperation frustration anger rage outrage "
    "fury wrath hostility ferocity bitterness hate loathing scorn spite vengefulness dislike resentment disgust "
    "revulsion contempt envy jealousy torment"
)
_SADNESS = (
    "agony suffering hurt anguish depression despair hopelessness gloom glumness sadness unhappiness grief sorrow woe "
    "misery melancholy dismay disappointment displeasure guilt shame regret remorse alienation isolation neglect "
    "loneliness rejection homesickness defeat dejection insecurity embarrassment humiliation insult pity sympathy"
)
_FEAR = (
    "alarm shock fear fright horror terror panic hysteria mortification anxiety nervousness tenseness uneasiness "
    "apprehension worry distress dread"
)
NAMES = tuple(" ".join((_LOVE, _JOY, _SURPRISE, _ANGER, _SADNESS, _FEAR)).split())


def _emo135(row: Row) -> str | None:
    """The expression of a row of Emo135: in other sources happiness is one of seven, not of 135."""
    return row.get("expression") if row.get("source") == "emo135" else None


TASK = expression_task(
    "expression_135",
    {name: (name,) for name in NAMES},
    ("Which emotion does the face show, in one noun?", "Name the emotion on the face in one word."),
    ("In one noun, what emotion is it?",),
    source=_emo135,
    claim="the face shows {}",
)
