"""Secure aggregation without the federation: bytes and integers in, bytes and integers out.

The protocol is that of Bonawitz et al. 2017 (CCS, "Practical Secure Aggregation for
Privacy-Preserving Machine Learning", figure 4) for a server that follows it and clients that may
drop out. ``wrappers/secagg.py`` puts it around a method, and ``docs/security.md`` says what it
promises.
"""
