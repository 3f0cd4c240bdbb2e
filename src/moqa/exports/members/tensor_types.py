"""`tensor-types`: a plan as the file that llama-quantize takes with --tensor-type-file."""

from moqa.exports.registry import ExportJob, exports
from moqa.exports.sources import opened, planned
from moqa.exports.work import check_new_file
from moqa.gguf import find_family
from moqa.storage.artifact import write_whole
from moqa.storage.folders import writing
from moqa.tasks.names import depth


@exports("tensor-types")
def tensor_types(job: ExportJob) -> list[str]:
    """The types of a plan, for llama-quantize --tensor-type-file: one expression for each tensor."""
    plan, profile = planned(job, "llama.cpp")
    view = opened(job, profile)
    check_new_file(job)
    config = view.model.config
    family, layers = find_family(config), depth(config)
    types: dict[str, str] = {}
    for name, scheme in plan.units.items():
        theirs = family.name(f"{name}.weight", layers).replace(".", r"\.")
        types[theirs] = "bf16" if scheme.is_unquantized else scheme.encoding
    with writing(job.out):
        job.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(job.out, "".join(f"^{theirs}$={kind}\n" for theirs, kind in types.items()))
    return [
        "llama-quantize --imatrix IMATRIX --token-embedding-type bf16 --output-tensor-type bf16 "
        f"--tensor-type-file {job.out} BF16.gguf OUT.gguf Q4_K_M writes the same types"
    ]
