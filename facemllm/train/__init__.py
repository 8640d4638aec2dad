"""Training: a run (`stage`) is launched by Ray (`launch`) or `torchrun`; each `worker` trains its part in `loop`."""
