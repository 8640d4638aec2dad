"""The report of a run as one HTML file that opens anywhere: `write_report`."""

from facemllm.evaluation.report.write import write_report

__all__ = ["write_report"]
