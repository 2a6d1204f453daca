"""Segmentation: nnU-Net, behind one adapter."""
