"""Plan: which sites the rules of an operation cut in a capture, and what is checked before."""
