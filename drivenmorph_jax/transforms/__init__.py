"""Transforms between the worlds of two images, in millimetres: their files, points, and affine alignment."""
