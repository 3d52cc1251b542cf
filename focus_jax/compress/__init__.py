"""Ways of spending less on visual tokens: shared primitives and one file per method."""
