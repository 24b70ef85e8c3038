"""What can go wrong at the door; here, and not in ``types``, so that the command line can say it without loading torch."""


class BadInput(Exception):
    """Something the user gave is wrong: one line that names the file or field, the value and the nearest valid choice."""


class WireError(Exception):
    """A message that cannot be used: damaged, of another configuration, of another round, or not what was asked for."""


class NotStackable(WireError):
    """Several clients cannot be kept apart side by side here, though one by one they can."""


class Forgotten(WireError):
    """A client lacks the memory that a request assumes; the next request has to assume none."""
