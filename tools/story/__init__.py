"""The demonstration: a real model operated on, trained, folded, and used without this package."""
