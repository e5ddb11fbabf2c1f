"""Images: reading, writing, orientation, working grids, intensities, bias, contrast, masks."""
