"""The controllers: of one node, and the pure code that decides for it."""
