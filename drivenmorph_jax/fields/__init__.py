"""Displacement and velocity fields: grids, warps, integration, inverses, Jacobians, smoothing. Plain functions."""
