"""What lies on disk: cells' folders, written and read."""
