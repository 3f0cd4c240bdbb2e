"""`imatrix`: the importance matrix of llama.cpp, from a profile."""

import torch

from moqa import __version__
from moqa.exports.importance import Importance, ImportanceSamples
from moqa.exports.registry import ExportJob, exports
from moqa.exports.sources import opened
from moqa.exports.work import file_of_work
from moqa.gguf import find_family
from moqa.gguf.importance import write_importance
from moqa.methods.ggml import encoders
from moqa.profiling import read_profile
from moqa.tasks.names import depth


@exports("imatrix")
def imatrix(job: ExportJob) -> list[str]:
    """The importance matrix that llama-quantize takes with --imatrix, from a profile's samples: per expert.

    Squared inputs of an expert are weighted with the squared weight that the router gave its output. An expert that no
    token reached has a count of 0, which llama-quantize knows.
    """
    encoders()
    profile = job.profile or read_profile(job.source)
    view = opened(job, profile)
    config = view.model.config
    family, layers = find_family(config), depth(config)
    mixture = {name: 1 / len(profile.names) for name in profile.names}
    facts = {"moqa": __version__, "to": "imatrix", "samples": profile.digest(mixture)}
    with torch.no_grad(), file_of_work(job, facts, 0) as (work, path):
        samples = ImportanceSamples(view, mixture, profile, work)
        for layer in range(layers):
            if work.done(f"layer-{layer}") is None:
                job.report("export", layer, layers)
                seen, stacks = samples.of_layer(layer), dict[str, list[str]]()
                for unit in view.block_units(layer):
                    stacks.setdefault(family.name(f"{unit.name}.weight", layers), []).append(unit.name)
                tensors = {}
                for theirs, names in stacks.items():
                    features = view.units[names[0]].shape[1]
                    none = Importance(torch.zeros(features), 0)
                    found = [seen.get(name, none) for name in names]
                    tensors[f"{theirs}.in_sum2"] = torch.stack([one.squares for one in found])
                    tensors[f"{theirs}.counts"] = torch.tensor([one.tokens for one in found]).float()[:, None]
                work.save(f"layer-{layer}", tensors)
                work.mark_done(f"layer-{layer}", {})
                samples.forget(layer)
        job.report("export", layers, layers)
        windows = sum(len(profile.samples(name)) for name in profile.names)
        saved = (work.load(f"layer-{layer}") for layer in range(layers))
        write_importance(path, profile.names, windows, profile.record.settings.context, saved)
    return []
