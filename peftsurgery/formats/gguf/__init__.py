"""llama.cpp's adapters in GGUF files: written."""
