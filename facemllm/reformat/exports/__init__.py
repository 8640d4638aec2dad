"""Conversations in the formats of other tools: `export(settings, conversations, out, "llava")`.

facemllm export CONVERSATIONS OUT --format llava|sharegpt|trl|facebench|facexbench [--split test]
"""

from facemllm.reformat.exports.step import FORMATS, export

__all__ = ["FORMATS", "export"]
