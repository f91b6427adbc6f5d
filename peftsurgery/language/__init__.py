"""The language of rules: schema, expressions and their readings, selection."""
