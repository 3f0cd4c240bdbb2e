"""The commands in the order of the work, each with an example for its help."""

EXAMPLES = {
    "quantize": (
        "moqa quantize allenai/OLMoE-1B-7B-0924 --bpw 3 --data wiki=wiki.txt -o OLMoE-3bpw",
        "moqa quantize MODEL --plan plan.json -o OUT",
    ),
    "profile": ("moqa profile MODEL --data wiki=wiki.txt --data code=code.jsonl:text -o PROFILE",),
    "plan": (
        "moqa plan PROFILE --bpw 3 -o plan.json",
        "moqa plan PROFILE --bpw 3.4 --engine llama.cpp -o plan.json",
        "moqa plan PROFILE --fit 8GiB --ignore '*.layers.0.*' --set '*.self_attn.*=8' -o plan.json",
    ),
    "compare-plans": (
        "moqa compare-plans PROFILE --bpw 3",
        "moqa compare-plans PROFILE --bpw 3 --data novels=novels.txt --json ranking.json",
    ),
    "recover": ("moqa recover OUT --for 15m -o NEW",),
    "reduce": ("moqa reduce MODEL --experts 8 --data wiki=wiki.txt -o SMALLER",),
    "evaluate": ("moqa evaluate OUT --data novels=novels.txt",),
    "report": ("moqa report PROFILE OUT -o report.html",),
    "export": (
        "moqa export plan.json --to gguf -o model.gguf",
        "moqa export PROFILE --to imatrix -o imatrix.gguf",
        "moqa export OUT --to compressed-tensors -o FOLDER",
    ),
    "inspect": ("moqa inspect OUT",),
    "verify": ("moqa verify OUT",),
    "adjust": ("moqa adjust OUT --data german=german.txt -o ADJ",),
    "mixture": (
        "moqa mixture build MODEL --budget 3bpw --data wiki=wiki.txt --data code=code.txt -o MIX",
        "moqa mixture build MODEL --variants variants.yaml --data wiki=wiki.txt --data code=code.txt -o MIX",
    ),
    "merge": ("moqa merge BASE --variant math=MATH --variant code=CODE -o MERGED",),
    "generate": ("moqa generate OUT 'Once upon a time' --max-tokens 64",),
    "chat": ("moqa chat OUT --adjustment ADJ",),
    "serve": ("moqa serve OUT --port 8000",),
    "vla": (
        "moqa vla profile POLICY --data demos=DEMONSTRATIONS -o PROFILE",
        "moqa vla plan PROFILE --bpw 3 --floor projector=4 -o plan.json",
        "moqa vla quantize POLICY --plan plan.json -o OUT",
        "moqa vla rollout OUT --episodes 20 -o ROLLOUT",
    ),
    "federated": ("moqa federated run experiment.toml -o runs/federated/one",),
    "bench": ("moqa bench OUT --threads 8",),
}
