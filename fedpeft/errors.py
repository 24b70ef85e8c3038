"""What can go wrong at the door; apart from ``types``, so that saying it does not load torch."""


class BadInput(Exception):
    """Something the user gave is wrong.

    One line that names the file or field, the value and the nearest valid choice.
    """


class WireError(Exception):
    """A message that cannot be used: damaged, stale, of another configuration, or not as asked."""


class NotStackable(WireError):
    """Several clients cannot be kept apart side by side here, though one by one they can."""


class Forgotten(WireError):
    """A client lacks the memory that a request assumes; the next request has to assume none."""
