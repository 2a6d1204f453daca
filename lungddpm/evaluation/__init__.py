"""How well a segmenter does: measures of voxels, surfaces and lesions, FROC."""
