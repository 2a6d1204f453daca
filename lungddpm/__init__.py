"""lungddpm: does synthetic CT from a layout-guided diffusion model make a lung-nodule segmenter better?"""

__version__ = "0.1.0"
