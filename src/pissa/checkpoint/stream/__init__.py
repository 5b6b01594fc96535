"""A checkpoint split, verified or merged without ever being in memory."""
