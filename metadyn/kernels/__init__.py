"""Kernels: an LSTM over a whole episode, several backends behind one function."""

from metadyn.kernels.lstm import LSTMWeights, cell, lstm

__all__ = ["LSTMWeights", "cell", "lstm"]
