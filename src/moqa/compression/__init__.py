"""The main job: a model, the texts it will see and a budget in; checkpoint, proof and report out."""
