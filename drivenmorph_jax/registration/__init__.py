"""Registration of two images, in stages: read, align, plan, prepare, deform, transfer, score."""
