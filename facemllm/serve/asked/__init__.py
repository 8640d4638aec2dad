"""What is asked, and whether it may be asked."""
