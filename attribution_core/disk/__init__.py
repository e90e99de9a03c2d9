"""What is kept in folders, and whether it was made of the same things."""
