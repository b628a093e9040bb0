"""Numbers reach people: terminal, papers, one HTML page, pictures."""
