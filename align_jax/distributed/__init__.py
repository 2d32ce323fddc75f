"""Meshes and the table that says how named array dimensions lie on them."""
