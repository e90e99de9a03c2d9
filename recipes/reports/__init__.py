"""What came out, on the screen and as one page."""
