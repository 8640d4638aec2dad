"""`facemllm gc`: results, unfinished work and caches that nothing names any more leave a home.

`roots.py` lists what names results, `rubbish.py` what is named by nothing and old enough, `sweep.py` removes it.
"""
