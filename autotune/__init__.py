"""Which configuration serves a problem: choices that were measured, where they are kept, and how they are found.

`choice` is what a call asks: a stored choice of its bucket, or of a neighbour, or else the kernel's own first pick.
Nothing here ever times anything beside a user's work.
"""
