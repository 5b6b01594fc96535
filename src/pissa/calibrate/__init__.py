"""What a model does on a user's own data: second moments of layer inputs, gradients of weights, in bounded memory."""
