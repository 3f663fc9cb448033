"""Owns the text side of tokens: tokenizer, detokenizer, the output of one sequence, grammars that constrain it.
May not know tensors, the scheduler or a wire format."""
