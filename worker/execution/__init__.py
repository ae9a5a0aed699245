"""Plans executed: which of them when, on what threads, and what is kept of one between requests for its partitions."""
