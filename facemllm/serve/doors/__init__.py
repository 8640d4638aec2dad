"""The protocols that the server speaks; each turns its requests into the one language of `facemllm.serve.language`."""
