"""Equality with other people's code and with loops written out in the test."""
