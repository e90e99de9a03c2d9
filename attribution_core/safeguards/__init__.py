"""What must never happen silently, found by trial."""
