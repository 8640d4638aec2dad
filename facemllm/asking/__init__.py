"""Asking vision-language models that are not ours, over HTTP or on this machine; annotation and evaluation share it.

`requests` says what is asked, `store` finds replies or has them sent, `endpoint` sends to an OpenAI-compatible API
(`completions` is one request, `budget` what all may cost), `local` answers with a model on this machine.
"""
