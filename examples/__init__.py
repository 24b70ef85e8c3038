"""Short programs to read: a method in one file, a federation in one page."""
