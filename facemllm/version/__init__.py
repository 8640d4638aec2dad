"""Data versions: `record` both tables as one revision, `restore` a revision's very bytes, `log` all, `diff` two.

A data repository of its own (git + DVC, settings `versioning`) holds them, so that neither images nor their history
enter the code's repository. A revision is a git commit whose name depends on the recorded bytes and on the revisions
before it; recording the same bytes again gives the same revision. About 2 s for 60 MB either way.
The remote is a folder or an S3 bucket (`pip install dvc-s3`); AWS_ENDPOINT_URL leads to another S3 than Amazon's.
"""
