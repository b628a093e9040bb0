"""What policies read from a file, trained heads or statistics of queries; each by a command."""
