"""Data: record formats, sources, tokenisation, batches and the loader; numpy only, no jax."""
