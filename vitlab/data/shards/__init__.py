"""What lies on disk: tars, the index beside them, and what a look at them finds."""
