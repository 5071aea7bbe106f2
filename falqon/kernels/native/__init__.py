"""The CPU path's own C++: what lies between matrix products, and with AMX these as well."""
