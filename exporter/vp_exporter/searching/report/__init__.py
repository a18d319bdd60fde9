"""What a search says of itself: its verdict, its page and the pictures on it."""
