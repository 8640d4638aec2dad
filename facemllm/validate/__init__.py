"""Checks of the tables before anything is trained on them: `validate(settings, raw, annotated, conversations, out)`.

Great Expectations runs the suites of `suites.py` at every boundary (raw faces, annotated faces, conversations, and the
groups that filters thin) over light columns derived from the streamed tables, each of which is read once; images are
decoded once and never reach a data frame. A critical failure stops the workflow, a warning is reported.

4,000 faces take 11 to 15 s on one CPU, a third of which is the import of Great Expectations, a third the reading of
captions. Memory is 350 MB and 2.2 KB a face over all tables, beside what Arrow reads ahead of a shard: some hundred
thousand faces are fine (300,000: 1 GB).
"""
