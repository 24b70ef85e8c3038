"""Laws, a file per module or method: references are worked out in the test."""
