"""The formats of peft: its adapter directories, read and written."""
