"""Federations of real machines: a server, and sites that keep their data."""
