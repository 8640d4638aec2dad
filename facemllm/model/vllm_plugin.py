"""vLLM's plugin (entry point `vllm.general_plugins`): makes the tiny preset's tower known in every process of vLLM.

It is served by `--model-impl transformers`. vLLM hands a model's configuration from process to process before it loads
plugins, so this package has to be installed in vLLM's environment: `pip install --no-deps facemllm`.
"""


def register() -> None:
    """Register the tower with transformers, once or more often."""
    import facemllm.model  # noqa: F401
