"""What strangers wrote, checked at one door: JSON and its fields so far."""
