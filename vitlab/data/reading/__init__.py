"""Which sample comes when, and batches of them: the same for any workers, any loaders, from any step."""
