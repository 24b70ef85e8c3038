"""Fuzzing: every surface that bytes of others reach, with one target function each.

The normal tests try a few hundred mutations of valid messages; ``make fuzz`` tries 10,000 of each, Hypothesis' own inputs,
and what a coverage-guided fuzzer finds (see ``__main__.py``). Inputs that once broke something are kept in ``found``.
"""
