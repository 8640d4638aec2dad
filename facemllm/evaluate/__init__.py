"""What a model can do on people it has not seen: predictions, figures with intervals, and baselines."""
