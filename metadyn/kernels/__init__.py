"""Kernels: an LSTM over whole episodes, several backends behind one function; matrix products."""
