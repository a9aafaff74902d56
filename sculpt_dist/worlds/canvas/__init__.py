"""The canvas: a small drawn world, the fast default of tests and examples."""
