"""Who calls, and how much of the service a caller may have."""
