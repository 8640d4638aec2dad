"""The loop in plain torch: what a stage trains, its losses, and what is watched while it runs."""
