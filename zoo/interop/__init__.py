"""Checkpoints of other libraries, both ways: a directory in the Hugging Face layout to our parameters, and back."""
