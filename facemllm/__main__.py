"""`python -m facemllm` is the `facemllm` command."""

from facemllm.cli import main

main()
