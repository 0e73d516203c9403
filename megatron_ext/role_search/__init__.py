"""A search for the role table that keeps both tasks at a given cost."""
