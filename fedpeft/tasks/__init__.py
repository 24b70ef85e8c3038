"""What is learnt: rows -> encoded -> batch -> per-example loss -> counts -> metric."""

from fedpeft.tasks.classification import Classification, Encoded, Scores

__all__ = ["Classification", "Encoded", "Scores"]
