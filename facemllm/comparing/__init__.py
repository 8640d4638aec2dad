"""Two runs side by side on the same questions about the same people: where one is shown to be better.

`find` tells which evaluation a run's name means, `compare` pairs the answers (`facemllm.scoring.paired`), `terminal`
and `page` show what came of it. A difference is shown when its p value is below 5 %, corrected (Holm) for all tasks, or
all items, or all groups of people.
"""
