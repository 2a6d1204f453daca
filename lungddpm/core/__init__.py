"""What every room needs: labels, volumes, the case contract, files and locks, devices, errors, progress."""
