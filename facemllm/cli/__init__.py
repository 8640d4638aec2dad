"""The command line `facemllm`."""
