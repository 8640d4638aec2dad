"""Checkpoints of a stage: what is in them, and the folder or bucket they are kept in."""
