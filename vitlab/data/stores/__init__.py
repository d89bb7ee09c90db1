"""Shards at a URL: transfers with patience, a bounded cache, files fetched ahead of their need."""
