"""The CPU path's own C++: what lies between matrix products, and these where it can."""
