"""Evaluation of a segmenter: measures of voxels, surfaces and lesions, FROC."""
