"""Checks of both tables before anything is trained on them: `validate(settings, faces, conversations, out)`.

Great Expectations runs the suites of `suites.py` over light columns that `columns.py` derives from the streamed
tables; images are decoded once and never reach a data frame. A critical failure stops the workflow, a warning is
reported. Runs on a CPU in about 10 s for 4,000 faces, 5 s of which is the import of Great Expectations.
"""

from facemllm.quality.step import Verdict, validate

__all__ = ["Verdict", "validate"]
