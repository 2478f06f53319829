"""The training side: what needs torch. Only the command line loads it, and only when asked."""
