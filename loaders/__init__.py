"""Loading image-text pairs: shards, sources, decoding backends and the demonstration data."""
