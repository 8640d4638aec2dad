"""Readers of the native layouts of published face datasets, one module a source; see `facemllm/ingest/reader.py`."""
