"""Why there is no reply: for one row, or for all."""


class RowRefused(Exception):
    """A row that cannot be described; the message is the reason, in words for the quarantine table."""


class Filtered(RowRefused):
    """A row that the endpoint's content filter declines. Asked again, it would be declined again."""


class JobStopped(Exception):
    """Nothing more can be described now (a failing endpoint, a spent budget): the message is what is wrong and how to
    mend it. It ends the job, keeping what is done; it never sends a row to quarantine."""
