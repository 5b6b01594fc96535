"""What a model is judged on: each task reads problems from a file and gives one figure and every sample."""
