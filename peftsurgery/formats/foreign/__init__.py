"""LoRAs as kohya's trainer, diffusers and mlx-lm write them: read, without torch."""
