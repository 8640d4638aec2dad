"""What a model can do on people it has not seen: predictions, figures with intervals, baselines, and the report.

`evaluate` runs a model and writes a folder, `score` repeats the figures from saved predictions, `write_report` and
`results_table` show them.
"""
