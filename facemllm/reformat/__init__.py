"""Faces to conversations: `reformat(settings, faces, out)`, one row of questions and answers an image.

facemllm reformat FACES OUT
"""

from facemllm.reformat.run import reformat

__all__ = ["reformat"]
