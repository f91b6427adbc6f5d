"""The names of kohya's trainer, which diffusers and other image tools read: written."""
