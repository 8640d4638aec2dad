"""Two runs side by side on the same questions about the same people: where one is shown to be better.

`find` tells which evaluation a run's name means, `compare` pairs the answers (`facemllm.scoring.paired`), `terminal`
and `page` show what came of it. A difference is shown when its p value, corrected for the figures compared with it
(Holm), is below 5 %.
"""
