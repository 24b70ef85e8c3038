"""Differential privacy without the federation: bounds, noise, and what a number of releases costs.

``wrappers/dp.py`` puts it around a method for whole clients, ``wrappers/dpsgd.py`` for single
examples, and ``docs/security.md`` says what it promises.
"""
