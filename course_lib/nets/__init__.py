"""Networks: whatever has weights, and nothing else."""
