"""What docs/results/mixture.md says around its tables; see `mixture_page.py`."""

TEXT = """# Mixtures

Command: `make mixture-study` (`benchmarks/mixture_study.py`; rows in `runs/mixture/summary.json`). Reference model. Of
each window of 256 held-out tokens the router sees the first 64 and the rest is scored; 24 windows per text. KL
divergence from the original in nats per token, ± half of a 95 % interval over windows; differences are paired by
window. Variants are fitted on four fifths of the calibration texts, routers on windows of the last fifth, a quarter of
them held out, and everything is measured on the test texts. How it works: [methods/mixture.md](../methods/mixture.md).
{before}
{claims}

## Adjustments of one base
The base is fitted on wiki and novels by the default plan; an adjustment of 1.46 % of its bytes, from 192 windows, is
made for each of the other four. `always-right` knows each text's adjustment, `oracle`
knows the losses of each prompt. The picture is of 2.5 bits.

![Mean KL by number of variants](mixture-adjustments.svg)

{tables}
With the first 2 to 5 variants (base, python, math, german, french):

{counts}
{novel}"""
WHOLE = """## Whole checkpoints
Five checkpoints of equal bytes: by gptq on wiki, python and german together (`all`), on each alone, and by rtn, which
sees no text; routers learn from 32 windows of each of the three. Known are these three texts, novel are novels, math
and french. Bars are relative to the best single variant.

There is little to choose: `all` is nearly as good on each text as the variant that is fitted on that text alone. So the
best choice of each prompt, which knows the losses, gains little over `all`, and routers get a part of it. The mean of
all logits, for five times the work, gains several times as much as the best choice, because errors of different
variants cancel. What routers do with novel texts has [a page of its own](mixture-novel.md).

![Known texts](mixture-known.svg)

![Novel texts](mixture-novel.svg)

How much there is to choose, against the best single variant:

{ceilings}
Known texts:

{known}
Novel texts:

{novel}
{tables}"""
BEFORE = """
Routers of this page chose by probability alone, with a threshold from samples of known kinds. [Routers of
today](mixture-novel.md) know what is familiar to them.
"""
IMAGES = """## Images
The reference's ResNet on CIFAR-10; 500 held-out images of each kind. Five checkpoints of equal bytes, all with a scale
per 256 weights: rounded between the ends of each tensor, of each channel, and of each channel without .1 % at either
end (weights that share an end have equal scales); by gptq; and trained with its rounding for 100 steps of 32 images
(`moqa.qat`) to answer as the original. Known are plain and noisy images: the training draws from 2,400 of each, of
which gptq reads 256, and 600 others of each are for the router. Novel are blurred and dark ones. The router is an
SE-ResNet of {bytes} bytes that sees the image alone. Bars are of 4 bits, relative to the best single variant, which is
the best on the images that are scored.

At 4 bits gptq has about a fifth of the divergence of the next variant, and the router leaves every image to it: where
another variant is better on one image, nothing in the image told so. `moqa mixture build` makes gptq the only choice.
At 8 bits it is the same with far smaller numbers, and so few steps of training do more harm than rounding alone.
The mean of logits is worse than gptq alone, because its other members are. For one image a route takes more than the
wanted share, for 32 less: the ResNet has 21 small convolutions to call, the router 9 smaller ones.

![Images](mixture-images.svg)

How much there is to choose, against the best single variant:

{ceilings}
Known images:

{known}
Novel images:

{novel}
{tables}"""
PLANES = """## Shared planes
Checkpoints of one width by gptq on wiki, python and german, measured on all six texts. A narrower one can be the upper
planes of a wider one (its scales and zero-points follow, no integer is stored twice), or the wider one can be built on
the planes of the narrower one. Why mixtures do neither: [decisions](../decisions.md).

{table}"""
ENDING = """## The paper's claims
MoQE (arXiv 2508.09204) routes per token, by a router that sees the token to predict (its released code has no causal
mask), with up to three experts for each token. Here a prompt gets one variant, from its own tokens alone.

"""
