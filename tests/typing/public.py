"""Every public name as a type checker sees it; never run. The comment behind a `reveal_type` is what must be found."""

from pathlib import Path
from typing import reveal_type

from torch.nn import Linear

import moqa
from moqa.federated import Experiment, FedHQ, LocalMode, in_mode, run
from moqa.format.scheme import Scheme
from moqa.qat import Inputs, prepare
from moqa.vla import plan_policy, profile_policy, quantize_policy, rollout

texts = moqa.Distribution("notes", ("a text",), "notes.txt")
profile = moqa.profile("model", {"wiki": "wiki.txt", "notes": ["a text"]}, "out.profile", samples=8)
reveal_type(profile)  # moqa.profiling.store.Profile
reveal_type(moqa.read_profile("out.profile"))  # moqa.profiling.store.Profile

budget = moqa.memory_budget(profile, "8GiB", batch=2)
reveal_type(budget)  # moqa.planning.fit.MemoryBudget
reveal_type(moqa.Budget.parse(bpw=3))  # moqa.planning.budget.Budget | None
plan = moqa.plan(profile, "3bpw", strategy="budget", ties="expert")
reveal_type(plan)  # moqa.planning.record.Plan
reveal_type(plan.account.bits_per_weight)  # float
reveal_type(moqa.read_plan("plan.json"))  # moqa.planning.record.Plan

comparison: moqa.PlanComparison = moqa.compare_plans(profile, "3bpw", data={"notes": "notes.txt"})
reveal_type(comparison.plans[0].over_uniform)  # moqa.planning.record.Gain | None

executor = moqa.find_executor("local")
reveal_type(executor)  # moqa.execution.local.Executor
memory = moqa.MemoryLimit.parse("4GiB")
reveal_type(memory)  # moqa.memory.limit.MemoryLimit
reveal_type(moqa.quantize("model", plan, "out", memory=memory, engine=executor))  # pathlib.Path
exported: moqa.Exported = moqa.export("plan.json", "model.gguf", to="gguf", profile=profile)
recovered: moqa.Recovered = moqa.recover("out", "better", length="15m", profile=profile)

reveal_type(moqa.reduce("model", 8, [texts], "smaller", by="uncurl"))  # pathlib.Path

trained = prepare(Linear(64, 32), Scheme(width=2), inputs=Inputs(8), keep=["head"])
reveal_type(trained.stored())  # dict[str, torch._tensor.Tensor]
reveal_type(trained.pack())  # torch.nn.modules.module.Module

mode = LocalMode("qat", 3)
with in_mode(Linear(64, 32), mode) as layer:
    reveal_type(layer)  # torch.nn.modules.module.Module
reveal_type(run(Experiment(data="text"), Path("out")))  # moqa.federated.records.FederatedRecord
reveal_type(FedHQ(bits=3).rounds)  # list[moqa.federated.records.RoundRecord]

options = moqa.CompressOptions(strategy="uniform", widths=(2, 4), objective="minimax")
reveal_type(options.profile)  # pathlib.Path | None
result = moqa.compress("model", [texts], budget, Path("out"), held_out=["wiki=wiki.txt"], options=options)
reveal_type(result)  # moqa.compression.result.CompressResult
reveal_type(result.proof)  # moqa.evaluation.proof.Proof | None

evaluation = moqa.evaluate("out", [texts], against="model")
reveal_type(evaluation)  # moqa.evaluation.run.Evaluation
reveal_type(evaluation.distributions["notes"].kl_divergence)  # float | None
reveal_type(moqa.report(["out"], "report.html"))  # pathlib.Path

model, tokenizer = moqa.load("out", width=4)
for piece in moqa.generate(model, tokenizer, "The", moqa.Sampling(max_tokens=8)):
    reveal_type(piece)  # moqa.generation.run.Piece
reveal_type(moqa.adjust("out", {"german": "german.txt"}, "german"))  # moqa.adjustment.run.Adjusted
reveal_type(moqa.merge("base", {"math": "math", "code": Path("code")}, "merged"))  # pathlib.Path
mixture = moqa.build_mixture("model", [texts], "mix", budget="3bpw")
reveal_type(mixture)  # moqa.mixture.build.BuiltMixture
built: moqa.BuiltMixture = mixture
measured: moqa.MixtureEvaluation = moqa.evaluate_mixture("mix", [texts])
variants: moqa.MergedEvaluation = moqa.evaluate_merged("merged", [texts])
reveal_type(moqa.bench("out"))  # moqa.speed.run.Speed
reveal_type(moqa.open_checkpoint("out"))  # moqa.format.reader.Checkpoint
records: tuple[type[moqa.Adjusted], type[moqa.Evaluation], type[moqa.Speed]]
artifacts: tuple[moqa.Profile, moqa.Plan, moqa.CompressResult, moqa.MemoryBudget]
mistake: moqa.MoqaError

# each of these is a mistake
moqa.plan(profile, "3bpw", nonsense=1)  # error
moqa.plan(profile, "3bpw", ties="all")  # error
moqa.CompressOptions(nonsense=1)  # error
moqa.CompressOptions(samples="many")  # error
moqa.compress("model", [texts])  # error
moqa.nonsense()  # error

shifts = profile_policy("policy", "demos=demonstrations", "out.profile", samples=8)
reveal_type(shifts)  # moqa.profiling.store.Profile
of_policy = plan_policy(shifts, "3bpw", by="aligned", floors={"projector": 8})
reveal_type(of_policy)  # moqa.planning.record.Plan
reveal_type(quantize_policy("policy", of_policy, "out", profile=shifts))  # pathlib.Path
reveal_type(rollout("out", "played", tasks=["reach"], episodes=2).tasks)  # dict[str, moqa.vla.records.TaskRecord]
