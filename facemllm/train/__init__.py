"""Training: a stage is ordered (`order`), launched by Ray (`launch`) or by torchrun (`alone`), and run rank by rank.

`batching` is what a step shows the model, `optimisation` the loop in plain torch, `checkpoints` what it goes on from.
"""
