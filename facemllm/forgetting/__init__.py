"""`facemllm forget`: a picture or a person leaves every table, cache, report and recorded revision, for good.

`forget` signs a tombstone first, so that a call that is cut short leaves a list which everything obeys; called again it
finishes the job. It ends by looking for the rows everywhere once more. Models are never deleted: those that have learnt
from the rows are named, with the decisions about them. One call searches one `storage.home`, `storage.runs`, the data
repository with its remote, and `data/` and DVC's cache under the project folder: repeat it for other profiles' homes.
"""
