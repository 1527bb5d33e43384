"""Synthetic tasks, tokenizer, transcripts, training and evaluation of the embedded model."""
