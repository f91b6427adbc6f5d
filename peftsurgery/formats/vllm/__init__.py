"""vLLM's rules for peft directories: written."""
