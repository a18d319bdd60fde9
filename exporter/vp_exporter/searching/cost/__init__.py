"""What a plan costs on the clock."""
