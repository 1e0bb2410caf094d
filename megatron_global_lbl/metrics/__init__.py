"""What a training shows of its balance. Reads what the core counts, changes nothing."""
