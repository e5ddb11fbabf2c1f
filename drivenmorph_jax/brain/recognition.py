def is_head(volume):
    import numpy as np
    return np.count_nonzero(volume.data > 0.1*np.percentile(volume.data[volume.data>0],99))*abs(np.linalg.det(volume.affine[:3,:3]))/1e3 > 2200
