"""KFP components, one file a step: a docstring and one call into `facemllm`. Nothing here holds logic."""

IMAGE = "face-mllm-python:0.1.0"
