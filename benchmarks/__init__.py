"""What the README's figures come from. Each module's `run` prints its own."""
