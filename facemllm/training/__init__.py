"""Training: stages as data, packed turns, the loop in plain torch, and its launch by Ray Train."""
