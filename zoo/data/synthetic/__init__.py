"""Sources that are drawn by rule instead of read from files: what a model must find in the words before it, at any length."""
