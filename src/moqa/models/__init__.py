"""Models as units: access to the original, and one view of experts and routers for all families."""
