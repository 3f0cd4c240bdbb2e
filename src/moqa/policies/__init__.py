"""Policies: models that turn pictures and an instruction into actions of a robot, and how their parts are found."""
