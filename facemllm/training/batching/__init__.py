"""What a step shows the model: the training split as arrays, what is drawn of it, packed and batched."""
