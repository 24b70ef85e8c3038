"""What a client computes: the local loop, evaluation, and how both use the machine."""
