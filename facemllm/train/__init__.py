"""Training: a stage run is prepared (`stage`), launched by Ray (`launch`) or `torchrun`, and trained by each `worker`.

`data` and `dataloader` are what a step shows the model, `loop` trains it in plain torch, `checkpoint` is what it
resumes from.
"""
