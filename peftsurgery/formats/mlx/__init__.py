"""mlx-lm's adapters: written."""
