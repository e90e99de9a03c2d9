"""What an adversary may do, does, and leaves behind: the parts of `applied.poisoning`."""
