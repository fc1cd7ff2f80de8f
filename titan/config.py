"""One frozen dataclass per TOML table: what can be configured, its default, its meaning and its check.

The string under a field is its documentation: `titan config` prints it, the reference is generated from it.
The annotation carries the check (`titan.fields`), so a value that a field cannot hold is refused by
`titan.toml` with the file, the key and what was expected. What several fields must satisfy together is in
`titan.check`. Nothing here imports torch: a wrong TOML is answered before anything heavy is loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from titan.fields import (
    SAVED,
    Accepted,
    Betas,
    Count,
    CountOrRest,
    CountOrZero,
    Counts,
    FaultText,
    Positive,
    PositiveOrZero,
    PositiveShare,
    Ranks,
    Reshard,
    Saved,
    Seed,
    Share,
    SourceName,
    Text,
    Trackers,
    Weights,
)
from titan.sharding import Style


@dataclass(frozen=True)
class Job:
    """The run as a whole: where it lives and when it stops."""

    output: str = ""
    """Folder of the run, on a file system that all nodes share. The same folder resumes. Empty: outputs/<config's name>."""
    stop_after: Count | None = None
    """Stop, with everything saved, once this step is done: exit code 75. Submit the same command again and it goes on."""
    max_seconds: Positive | None = None
    """Wall-clock budget of this start in seconds: stop, with everything saved, at the first step past it: exit code 75. A time
    limit that SLURM tells of ends it, too, job.shutdown_seconds (or a tenth of it, if that is less) before its end."""
    timeout_seconds: Positive = 1800.0
    """How long a collective waits for the other ranks, in seconds, before the job fails."""
    shutdown_seconds: Positive = 300.0
    """How long the ranks get to finish their step and save after a signal, in seconds, before they are killed."""
    hang_seconds: Positive = 900.0
    """After so many seconds without a step (compiling the first one counts), every rank tells where it is, and the job ends."""
    fault: FaultText = ""
    """A fault to have on purpose, for tests and lessons: KIND@STEP or KIND@STEP:RANK, with raise, kill, hang, nan, nan-batch,
    spike or save, as titan/fault.py explains. Empty: none."""


@dataclass(frozen=True)
class Model:
    """Which model: a name in models/, a size from its SIZES, and any field of its Config to change.

    `config` is not a key: it is the model's own Config dataclass, after the size and the changed fields.
    """

    name: Text = "llama3"
    """Folder in models/."""
    size: Text = "debug"
    """Key of the model's SIZES: the published hyperparameters to start from."""
    config: Any = field(default=None, metadata={"table": True})


@dataclass(frozen=True)
class Training:
    """Length and shape of the training."""

    steps: Count = 100
    """Optimizer steps in the whole run."""
    seed: Seed = 1
    """Seed of initial weights, data order and dropout."""
    seq_len: Count = 256
    """Tokens in a sequence."""
    global_batch_size: Count = 16
    """Sequences in an optimizer step, over all ranks and accumulated micro batches."""
    micro_batch_size: Count = 1
    """Sequences that a rank takes through the model at once."""
    clip_norm: PositiveOrZero = 1.0
    """Largest global gradient norm; a larger one is scaled down to it. 0: no clipping."""
    gc_interval: Count = 200
    """Steps between Python garbage collections, which are switched off in between so that no rank pauses alone."""


@dataclass(frozen=True)
class Optimizer:
    """AdamW. Matrices and embeddings decay; norms and biases do not."""

    lr: PositiveOrZero = 3e-4
    """Peak learning rate, after warm-up."""
    betas: Betas = field(default_factory=lambda: [0.9, 0.95])
    """Decay rates of the running means of the gradient and of its square."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: PositiveOrZero = 0.1
    """Decoupled weight decay, times the learning rate, per step."""


@dataclass(frozen=True)
class Loss:
    """Cross-entropy of the next token, summed over the tokens that count and divided by their number in the global batch."""

    chunk: CountOrZero = 2**24
    """Logits that are held at once (tokens x words). Where a micro batch has more, they are made in blocks of words, 128 at
    least, and once more for the backward pass: memory for a third more time in the head. 0: all at once."""
    z_loss: PositiveOrZero = 0.0
    """Weight of the squared log-sum-exp of a token's logits, which keeps it near zero; 1e-4 is usual. It is part of the
    training loss, and of no validation."""


@dataclass(frozen=True)
class Schedule:
    """The learning rate over the steps, as a share of optimizer.lr."""

    name: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """After the warm-up: constant; linear or cosine decay to the end; wsd (warm-up, stable, decay): constant, then linear."""
    warmup_steps: CountOrZero = 10
    """Steps over which the rate rises linearly from 0 to its peak."""
    decay_steps: CountOrZero = 0
    """wsd: steps of the last, decaying phase. 0: a fifth of training.steps."""
    min_lr_ratio: Share = 0.1
    """Where the decay ends, as a share of optimizer.lr."""


@dataclass(frozen=True)
class Source:
    """One source of a mixture, [[data.sources]]."""

    name: SourceName = "data"
    """What it is called in the logs; each source has another name."""
    path: Text = "builtin:topics"
    """As data.path."""
    content: Literal["text", "chat"] = "text"
    """As data.content."""
    column: str = ""
    """As data.column."""
    weight: PositiveOrZero = 1.0
    """Its share of the tokens, relative to the other sources' weights."""
    later_weights: Weights = field(default_factory=list)
    """Its weights from each step of data.stages on."""
    max_epochs: PositiveOrZero = 0.0
    """A run that would read it more often is refused. 0: no limit."""


@dataclass(frozen=True)
class Data:
    """What is read. Sample i is a pure function of the seed, the data and i, whatever the ranks."""

    path: Text = "builtin:topics"
    """A folder of token shards; token files of other programs, read as they lie: Megatron's .bin with .idx (or the common part
    of the two names), datatrove's and nanotron's .ds, llm.c's and nanoGPT's .bin, one file or a folder of them. Or text, which
    is prepared first, by all cores: .txt files (one document each), .jsonl, also .gz and .zst, .parquet or .arrow (a row a
    document), one file, a folder, or a pattern such as "corpus/*.jsonl.zst"; hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT
    for a Hugging Face dataset; or text that Python carries: builtin:topics (pydoc's language topics, half a megabyte),
    builtin:stdlib (the standard library's sources, 11 MB)."""
    content: Literal["text", "chat"] = "text"
    """What a row is: a text, or a conversation, of which only the assistant's turns count in the loss."""
    column: str = ""
    """Key or column of a row's text or messages. Empty: "text", or "messages" where content is "chat"."""
    chat_template: str = ""
    """A file with a Jinja template that writes conversations. Empty: the tokenizer's own."""
    on_bad: Literal["stop", "skip"] = "stop"
    """What to do with a row that is no document (bad UTF-8, no JSON, no text in it): stop and say which, or leave it out, count
    it and list it in left_out.txt beside the shards."""
    sources: list[Source] = field(default_factory=list)
    """Instead of path: several sources, each with its share of the tokens."""
    stages: Counts = field(default_factory=list)
    """Steps after which the sources have other weights, which later_weights names: [8000, 9000] makes three stages. Stages that
    have not begun may be added and changed when a run is resumed."""
    tokenizer: Text = "bytes"
    """The path of a sentencepiece model, of Hugging Face's tokenizer.json, of a file of tiktoken ranks (Llama 3's own), or of a
    folder that holds one of them; "train:4096" for a sentencepiece BPE of 4,096 tokens, trained on the training text at first
    use; or "bytes" (one token a byte, one for the document's end)."""
    dtype: Literal["", "uint8", "uint16", "uint32", "int32", "int64"] = ""
    """Type of the tokens in .bin files that do not say it themselves: nanoGPT's are "uint16"."""
    cache: Text = "outputs/data"
    """Folder for token shards made from text, named by content and tokenizer; on a file system that all nodes share."""
    validation_share: Share = 0.05
    """Share of the documents held out for validation when text is prepared; of other programs' files, none of which has val,
    valid, validation or dev in its name, the share at the end."""
    packing: Literal["contiguous", "best_fit"] = "contiguous"
    """How documents become sequences. contiguous: one after the other, cut every seq_len tokens. best_fit: whole, as many as
    fit in a sequence, with a little padding; only what is longer than seq_len is cut."""
    document_mask: bool = False
    """Attention stays inside a document, and positions start again at 0 in each. Off: a sequence is read as one text."""
    workers: CountOrZero = 0
    """Processes a rank reads ahead with, for storage that is slow. 0: read in the training process, which takes 0.1 ms for a
    thousand tokens where the shards are in memory, and a tenth of what handing batches between processes takes."""

    @property
    def all_sources(self) -> list[Source]:
        """The sources; path as the only one where none are named."""
        return self.sources or [Source(path=self.path, content=self.content, column=self.column)]


@dataclass(frozen=True)
class Validation:
    """Loss on held-out data. It moves neither the training position nor any random state."""

    interval: CountOrZero = 0
    """Steps between validations; one more follows the last step. 0: never."""
    batches: CountOrZero = 8
    """Global batches a validation takes, always the same ones, from all over the held-out split. 0: all there are."""


@dataclass(frozen=True)
class Sample:
    """Text that the model writes while it trains, to see what it has learned. It moves no random state of the training."""

    prompts: list[str] = field(default_factory=list)
    """What it goes on from, each by itself. None: no samples."""
    interval: CountOrZero = 0
    """Validations between samples; some more follow the last step. 0: only those."""
    tokens: Count = 64
    """Tokens to add to each prompt."""
    temperature: PositiveOrZero = 0.8
    """Divides the logits: below 1 is more careful, 0 always takes the likeliest token."""
    top_p: PositiveShare = 0.95
    """Draws among the likeliest tokens that have this much probability together."""


@dataclass(frozen=True)
class Parallel:
    """The plan: how the ranks share the work. world = pp x dp_replicate x dp_shard x cp x tp."""

    dp_replicate: CountOrRest = 1
    """Copies of the sharded model; gradients are summed over the copies."""
    dp_shard: CountOrRest = -1
    """Ranks that share one copy's parameters, gradients and optimizer states (FSDP2), together with the ranks of cp.
    -1: the ranks that are left."""
    tp: Count = 1
    """Ranks that share each matrix (tensor parallelism), and between the blocks each sequence."""
    async_tp: bool = False
    """Exchange sequences between the ranks of tp piece by piece, each multiplied while the next is on its way."""
    cp: Count = 1
    """Ranks that share each sequence (context parallelism)."""
    pp: Count = 1
    """Ranks that share the layers (pipeline parallelism)."""
    reshard_after_forward: Reshard = "auto"
    """Whether FSDP frees a block's gathered weights after its forward pass and gathers them again for the backward pass:
    "always", "never", a number of ranks as in "8" (frees, but keeps a copy within so many ranks, such as a node's), or
    "auto": always, but never under a pipeline, which would gather them for every micro batch."""
    cp_method: Literal["ring", "allgather", "ulysses"] = "ring"
    """How attention sees the other ranks' keys and values: ring (passed on from rank to rank while attention computes),
    allgather (collected before it), or ulysses (each rank gets whole sequences of some of the heads)."""
    pp_schedule: Text = "1F1B"
    """Order of the micro batches' passes: GPipe, 1F1B, Interleaved1F1B, InterleavedZeroBubble, ZBVZeroBubble, DualPipeV, or
    the path of a CSV file with a row a rank and cells such as 0F0, 1I3, 1W3, 0B2 (stage, pass, micro batch)."""
    pp_stages_per_rank: CountOrZero = 0
    """Stages that a rank holds. 0: as many as the schedule needs: 1, or 2 for the interleaved ones and for those in a V."""
    pp_split: Counts = field(default_factory=list)
    """Blocks of each stage, in order, as in [3, 5]. Empty: shared out by estimated FLOP, embedding and head counted."""
    sharding: dict[str, Style] = field(default_factory=dict)
    """Other words for modules in the model's sharding table: glob of module names = gather, col, heads, kv, row, seq,
    scatter, embed or head, such as {"layers.*.ffn" = "seq", "layers.*.ffn.*" = "seq"}: the feed-forward layers whole on every
    rank. On the command line: --parallel.sharding='{"head" = "seq"}'."""


@dataclass(frozen=True)
class Recompute:
    """Activations that are computed again in the backward pass instead of kept: memory for time."""

    mode: Literal["none", "full", "block", "selective"] = "none"
    """none; full: every block keeps only its input; block: so does every n-th; selective: blocks keep what `save` names."""
    every: Count = 2
    """block: one block in so many is recomputed."""
    save: Saved = field(default_factory=lambda: list(SAVED))
    """selective: the operations whose results are kept: mm (products with weights), attention, or ATen operations by name, such
    as aten.silu."""


@dataclass(frozen=True)
class Offload:
    """What lies in the host's memory instead of the device's: memory for traffic over the bus. On a CPU it saves nothing."""

    states: bool = False
    """Parameters, gradients and optimizer states, 16 bytes for each parameter that a rank holds. Each block's weights come to
    the device when it is its turn, and the optimizer runs on the host's cores. Under a pipeline, gathered weights and whole
    gradients are on the device until the step's end all the same."""
    activations: bool = False
    """What the blocks keep for the backward pass. With recompute.mode = "full" that is their inputs alone."""


@dataclass(frozen=True)
class Compile:
    """torch.compile of each block, in place."""

    enable: bool = False
    """Compile the blocks."""
    backend: Text = "inductor"
    """inductor; aot_eager traces alike but runs PyTorch's own kernels, to look for faults."""


@dataclass(frozen=True)
class Precision:
    """Number formats. Master weights, optimizer states and checkpoints are always float32."""

    param: Literal["float32", "bfloat16"] = "float32"
    """Format in which parameters and activations are computed."""
    reduce: Literal["float32", "bfloat16"] = "float32"
    """Format in which gradients are summed over the ranks. Under a pipeline always float32: there they add up first."""
    tf32: bool = False
    """On GPUs, multiply float32 matrices with 10 bits of significand (TensorFloat-32), several times as fast."""
    float8: Literal["none", "tensorwise", "rowwise"] = "none"
    """Compute the products of the blocks' linear layers in 8 bits, which GPUs since Ada and Hopper do twice as fast as in
    bfloat16. tensorwise: one scale a tensor; under FSDP weights travel in 8 bits, too. rowwise: a scale for each row, more
    exact and a little slower."""
    float8_skip: list[str] = field(default_factory=list)
    """Linear layers to leave in `param`: globs of their names, such as ["layers.0.*.*", "layers.*.attention.k"]."""
    float8_min_width: CountOrZero = 0
    """Leave those, too, of whose two widths in the whole model one is less than this: small products are not faster."""


Kernel = Literal["torch", "triton"]


@dataclass(frozen=True)
class Kernels:
    """Parts of the model that hand-written GPU kernels (Triton) can compute in place of PyTorch's operations or the compiler's.
    None has been measured against those on a GPU yet: all are off. On a CPU "triton" is the same function in plain PyTorch."""

    rms_norm: Kernel = "torch"
    """RMSNorm, together with the addition before it where there is one."""
    rope: Kernel = "torch"
    """The rotation of queries and keys."""
    swiglu: Kernel = "torch"
    """The feed-forward layer's activation. As compiled code does, it keeps its inputs alone for the backward pass."""
    linear_cross_entropy: Kernel = "torch"
    """What the loss does between its products: a block of logits is read once, and no float32 copy made of it."""
    float8_cast: Kernel = "torch"
    """Casts to Float8; a gradient both ways at once, where both its products are made at once."""

    @property
    def in_triton(self) -> list[str]:
        """Keys of those that are asked for."""
        return [key for key, value in vars(self).items() if value == "triton"]


@dataclass(frozen=True)
class Checkpoint:
    """Saving, and starting from what was saved. The newest whole step in job.output always wins."""

    interval: CountOrZero = 100
    """Steps between checkpoints; one more follows the last step. 0: only that one."""
    load: str = ""
    """A committed step's folder to take the weights from when job.output holds no step yet: training starts at step 0."""
    async_save: bool = False
    """Write beside training, which waits only for a copy in host memory: 12 bytes for each parameter that a rank holds."""
    when_busy: Literal["wait", "skip"] = "wait"
    """What an async save does that is due while another is still being written: wait for it, or leave itself out."""
    on_error: Literal["stop", "continue"] = "stop"
    """What follows a save that fails (a full disk, say): stop the job, or go on and try again at the next one. The last one
    always stops it."""
    keep_last: CountOrZero = 0
    """So many steps stay, the newest ones; older ones are removed once a newer one is committed. 0: all."""
    keep_every: CountOrZero = 0
    """Besides, steps that this number divides stay. 0: none for that reason."""
    keep_best: bool = False
    """Besides, the step with the least validation loss stays, of those that were validated."""
    copy_to: str = ""
    """URL of a folder to which committed steps are copied, as fsspec spells it: s3://bucket/run (with s3fs installed), gs://..
    (gcsfs), file:///.. The copying goes with the saving: with async_save, beside training. Empty: nowhere."""
    accept_changes: Accepted = field(default_factory=list)
    """Changes to go on with all the same, which make it another run: data.path (other tokens), data.sources (other weights of a
    stage that has begun: each source is then read on from where it would be, had they always held), data.packing and
    training.seq_len (the same number of samples is skipped, though they are others), data.tokenizer, training.seed."""


@dataclass(frozen=True)
class Guard:
    """Steps that must not count. A loss or gradient that is no number changes no weight: the step is run again, and only what
    is broken twice is real."""

    nonfinite: Literal["skip", "stop"] = "skip"
    """What follows a step that is broken twice: leave it out, or end the job."""
    spike_sigmas: PositiveOrZero = 0.0
    """Leave a step out whose loss is so many standard deviations above the mean of the last accepted ones; 6, say. 0: never."""
    spike_window: Count = 128
    """How many losses that compares with; before half of them are there, nothing is left out."""
    max_skips: CountOrZero = 10
    """So many steps in a row may be left out; one more ends the job."""


@dataclass(frozen=True)
class Metrics:
    """What is reported. A logged step waits for the device; the others do not."""

    interval: Count = 10
    """Steps between console lines, metrics.jsonl lines and TensorBoard points. The first and the last step are logged too."""
    trackers: Trackers = field(default_factory=lambda: ["tensorboard"])
    """Where scalars, the config and samples go besides metrics.jsonl: tensorboard (event files in <job.output>/tensorboard),
    wandb, mlflow (each needs its extra). []: nowhere."""
    project: Text = "titan"
    """The project or experiment that wandb and mlflow file the run under."""
    gradient_norms: CountOrZero = 0
    """Steps between gradient norms of each layer, which go to the trackers. 0: never."""


@dataclass(frozen=True)
class Profiling:
    """Steps to look into: <job.output>/profile gets a trace of each, which `titan profile` sums up."""

    start: CountOrZero = 0
    """The first step to look into. 0: none."""
    steps: Count = 1
    """How many, one after the other."""
    ranks: Ranks = field(default_factory=lambda: [0])
    """Ranks that write a trace."""
    memory: bool = False
    """On GPUs, write every block of memory with who asked for it, too, for pytorch.org/memory_viz."""


@dataclass(frozen=True)
class Config:
    """A whole TOML, resolved. `source` is the file it came from."""

    source: str = ""
    job: Job = field(default_factory=Job)
    model: Model = field(default_factory=Model)
    training: Training = field(default_factory=Training)
    optimizer: Optimizer = field(default_factory=Optimizer)
    loss: Loss = field(default_factory=Loss)
    schedule: Schedule = field(default_factory=Schedule)
    data: Data = field(default_factory=Data)
    validation: Validation = field(default_factory=Validation)
    sample: Sample = field(default_factory=Sample)
    parallel: Parallel = field(default_factory=Parallel)
    recompute: Recompute = field(default_factory=Recompute)
    offload: Offload = field(default_factory=Offload)
    compile: Compile = field(default_factory=Compile)
    precision: Precision = field(default_factory=Precision)
    kernels: Kernels = field(default_factory=Kernels)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    guard: Guard = field(default_factory=Guard)
    metrics: Metrics = field(default_factory=Metrics)
    profiling: Profiling = field(default_factory=Profiling)


@dataclass(frozen=True)
class Degrees:
    """The plan with every -1 resolved for a world size."""

    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1
    cp: int = 1
    pp: int = 1

    @property
    def data_parallel(self) -> int:
        """Ranks that see different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def world(self) -> int:
        return math.prod((self.dp_replicate, self.dp_shard, self.tp, self.cp, self.pp))


def degrees(parallel: Parallel, world_size: int) -> Degrees:
    """Resolve -1 against the world size. `titan.check` has said before whether they multiply up to it."""
    replicate, shard, others = parallel.dp_replicate, parallel.dp_shard, parallel.tp * parallel.cp * parallel.pp
    if shard == -1:
        shard = max(1, world_size // (max(1, replicate) * others))
    if replicate == -1:
        replicate = max(1, world_size // (shard * others))
    return Degrees(replicate, shard, parallel.tp, parallel.cp, parallel.pp)


def least_ranks(parallel: Parallel) -> int:
    """The fewest ranks that a plan runs on; 2 at least where it takes what is left."""
    given = (parallel.dp_replicate, parallel.dp_shard, parallel.tp, parallel.cp, parallel.pp)
    fixed = math.prod(degree for degree in given if degree != -1)
    return max(2, fixed) if -1 in given else fixed


def accumulation(training: Training, data_parallel: int) -> int:
    """Micro batches that a rank takes through the model in one step."""
    return training.global_batch_size // (data_parallel * training.micro_batch_size)
