"""What the lists of CelebA, MAAD-Face and LFWA say of persons rather than of faces: sex, origin, and looks as their
annotators judged them. Kept apart so that CelebA's mean over forty names can be formed where there is a reason to."""

from facemllm.tasks import things
from facemllm.tasks.base import Task

TASK = Task(
    name="presence_of_persons",
    metric="balanced_accuracy",
    higher_is_better=True,
    unit="",
    items=tuple(things.thing(name, words) for name, words in things.OF_PERSONS.items()),
    use="comparison with published figures, and fairness; not for decisions about people",
    sensitive=True,
)
