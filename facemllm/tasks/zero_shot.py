"""Zero-shot attribute analysis (Face-MLLM): yes/no questions about attributes that no training conversation mentions.

Which are held out says `reformat.held_out`; a held-out name is asked here, at evaluation alone.
"""

from facemllm.tasks import attributes, presence
from facemllm.tasks.base import Task

TASK = Task(
    name="zero_shot",
    metric="balanced_accuracy",
    items=tuple(item for task in (attributes.TASK, presence.TASK) for item in task.items if item.form == "boolean"),
    use="what a model makes of attributes it was not trained on",
)
