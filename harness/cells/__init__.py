"""Settings become rows: one cell, its samples, what each came to."""
