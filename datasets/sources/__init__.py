"""Folder layouts -> lists of source videos."""
