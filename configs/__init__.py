"""One file per result: plain values that a run is made of."""
