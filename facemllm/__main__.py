"""`python -m facemllm` is the `facemllm` command."""

from facemllm.cli.main import main

main()
