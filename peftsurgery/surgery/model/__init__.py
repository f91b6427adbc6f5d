"""Model: what a user holds after apply: its adapters, its captures, its report, its files."""
