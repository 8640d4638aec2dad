"""Asking vision-language models that are not ours, over HTTP or on this machine; annotation and evaluation share it.

`asking` finds replies in the store or has them sent; `carried` sends to an endpoint through a courier (`link`,
`courier`, `wire`, `account`); `local` answers with a model on this machine; `store` keeps every reply for good.
"""
