"""Surgery: rules applied to a captured model, taken out again, or folded into its weights."""
