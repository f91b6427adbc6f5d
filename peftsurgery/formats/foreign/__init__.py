"""LoRAs as kohya's trainer, LyCORIS, diffusers and mlx-lm write them: read, without torch."""
