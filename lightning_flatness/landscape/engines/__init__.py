"""Engines for products with the Hessian and the Gauss-Newton matrix, and their selection."""
