"""What methods compute with: weighted means, low-rank factors, seeded masks, rank importance."""
