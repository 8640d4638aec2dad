"""Data versions: `record` both tables as one revision, `restore` a revision's very bytes, `log` all of them.

A data repository of its own (git + DVC, settings `versioning`) holds them, so that neither images nor their history
enter the code's repository. A revision is a git commit whose name depends on the recorded bytes and on the revisions
before it; recording the same bytes again gives the same revision. About 2 s for 60 MB either way.
"""

from facemllm.versioning.repository import Revision
from facemllm.versioning.step import has, log, record, restore

__all__ = ["Revision", "has", "log", "record", "restore"]
