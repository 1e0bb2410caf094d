"""Pictures of a balance record, for the terminal and as one page. Reads the record only: no PyTorch, no Megatron."""
