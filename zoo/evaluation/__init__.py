"""What scoring a run at many lengths is made of: windows of a text, sums by position, attention resolution, passkeys, pictures."""
