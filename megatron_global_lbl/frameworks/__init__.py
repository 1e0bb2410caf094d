"""Entry points for training frameworks on Megatron-Core that have a place for one. Each module imports its framework."""
