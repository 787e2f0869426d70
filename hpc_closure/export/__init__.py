"""Closures for solvers in C, C++ and Fortran: a compiled draw and its sources."""
