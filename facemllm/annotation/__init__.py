"""Descriptions of faces: `annotate(settings, faces, out)`, a Ray Data job over a pluggable annotator.

    facemllm annotate FACES OUT

On a running Ray head 4,000 faces take a few seconds of one core; starting Ray for itself adds about ten.
"""

from facemllm.annotation.step import annotate

__all__ = ["annotate"]
