"""Kernels: an LSTM over a whole episode, several backends behind one function; dense products."""
