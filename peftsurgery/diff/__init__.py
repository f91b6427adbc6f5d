"""diff: what is different between two models, as data, text and a page."""
