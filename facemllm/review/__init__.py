"""The review page: what waits for a decision, on what it stands, and on the approver's machine the decision itself.

`facts.py` reads what a bundle says, `pages.py` gathers what a page shows, `drawing.py` and `templates/` write it,
`security.py` keeps the door, `app.py` is the server.
"""
