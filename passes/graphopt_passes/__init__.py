"""The passes that come with graphopt. One pass, one file; the engine knows none of them by name."""
