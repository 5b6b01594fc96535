"""From data to a fine-tuned model; data.py says how a row becomes input_ids and labels."""
