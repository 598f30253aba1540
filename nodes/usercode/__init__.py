"""The user's own code: looked at without running it, loaded from where it lies, called with typed messages."""
