"""Images of all kinds of sources to shards: read, checked, packed, resumable."""
