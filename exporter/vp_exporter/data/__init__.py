"""Images and their class names, as a folder has them."""
