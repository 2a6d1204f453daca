"""Shared by all rooms: labels, volumes, the case contract, files and locks, devices, errors, progress."""
