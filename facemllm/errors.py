"""The one exception a user is meant to read: what is wrong, where, and how to mend it, in one line."""


class UserError(Exception):
    """Something a user can put right. The command line prints its message as one line and exits with 1."""
