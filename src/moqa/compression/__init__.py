"""The main job, `moqa.compress`: from a model, the texts it will see and a budget to checkpoint, proof and report."""
