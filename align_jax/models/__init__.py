"""Decoder-only transformers, their heads, and the way in from and out to other people's files."""
