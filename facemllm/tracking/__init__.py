"""MLflow: what runs log, and what is read back."""
