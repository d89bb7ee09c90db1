"""What the families are built of: a file of parts for each family that needs one, and what several share."""
