"""The tests: contract (every method), laws (one file per idea), parity (with peft and plain loops), e2e (from the outside)."""
