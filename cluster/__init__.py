"""The pipeline on a cluster's Kubeflow: its specification, the API's client, runs and schedules, and their commands."""
