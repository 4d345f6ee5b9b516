"""Analyses of a captured program: frozen results that never touch the graph."""
