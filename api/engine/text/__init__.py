"""Owns tokens as text: tokenizer, detokenizer, the state of one output, grammars that constrain it.
Knows no tensors, no scheduler and no wire format."""
