"""Equal blocks: each is traced once, and its nodes are copied where an equal one is called."""
