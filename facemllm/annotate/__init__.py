"""Descriptions of faces: `run.annotate(settings, faces, out)`, a Ray Data job over a pluggable annotator.

    facemllm annotate FACES OUT [--estimate]

On a running Ray head 4,000 faces take the oracle a few seconds of one core; starting Ray for itself adds about ten.
What the job adds to a model's own time: `benchmarks/annotation.py`.
"""
