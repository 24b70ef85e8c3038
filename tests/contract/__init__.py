"""The contract that every row of METHODS keeps, on a tiny encoder."""
