"""Four bits: weights of the base kept packed, unpacked where a product reads them."""
