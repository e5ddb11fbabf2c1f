"""Labels of a scan from atlases: images with label maps are registered to it, and their labels are fused."""
