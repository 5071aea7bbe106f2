"""The CPU path's own C++: one-pass operations beside the matrix products of torch."""
