"""What a model does on a user's own text: second moments of layer inputs, in one pass and bounded memory."""
