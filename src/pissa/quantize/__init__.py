"""A residual in few bits: formats, scale search, and the alternation that fits residual and adapter to each other."""
