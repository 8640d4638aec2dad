"""Face-MLLM Workflow: build, train, evaluate, approve and serve a multimodal LLM for face perception."""

__version__ = "0.1.0"
