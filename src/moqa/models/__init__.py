"""Models as units: checkpoint access, and one view on experts and routers for all families."""
