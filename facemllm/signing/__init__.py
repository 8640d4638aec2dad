"""Signed decisions about models: keys, the policy that says who may decide, statements, where they are kept, and what
is in force. Knows nothing of MLflow, models or tables; who serves asks `authorization.authorize`.
"""
