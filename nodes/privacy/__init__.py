"""What keeps a client's data its own: noise with an account of it, and sums that hide their parts."""
