"""The engine: knows tokens and tensors, no HTTP and no OpenAI names."""
