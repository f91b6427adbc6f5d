"""Site functions: what a rule may call at sites of one kind, beside the operators."""
