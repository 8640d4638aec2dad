"""Gender as the source annotates it."""

from facemllm.tasks.base import Option, Task, column
from facemllm.tasks.items import Choice
from facemllm.tasks.wordings import kept

TASK = Task(
    name="gender",
    metric="balanced_accuracy",
    items=(
        Choice(
            name="gender",
            templates=("Is this a woman or a man?", "Which gender does the face show?", "What is the person's gender?"),
            unseen=("Does the face show a woman or a man?", "Which gender is the person?", *kept("gender")),
            options=(Option(value="female", text="a woman"), Option(value="male", text="a man")),
            source=column("gender"),
            claim="this is {}",
            patterns={
                "female": ("(?:a )?woman", "female", "girl", "lady"),
                "male": ("(?:a )?man", "male", "boy", "gentleman"),
            },
        ),
    ),
    use="checking balance and fairness of data and models; not for decisions about people",
    sensitive=True,
)
