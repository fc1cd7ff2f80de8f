"""The models, data and plans of the parity tests. Small: a mistake in a plan does not depend on the size."""

from __future__ import annotations

from pathlib import Path

from titan.commands.verify import planned
from titan.config import Config

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "train_configs" / "debug.toml")
COMMON = (
    "--data.tokenizer=bytes",
    "--model.dim=32",
    "--model.n_layers=4",
    "--model.n_heads=4",
    "--model.vocab_size=259",
    "--training.seq_len=32",
    "--training.global_batch_size=8",
    "--training.micro_batch_size=2",
    "--schedule.warmup_steps=5",
)
MODELS = {
    "llama3": (*COMMON, "--model.n_kv_heads=2", "--model.ffn_dim=50"),
    "gpt2": (*COMMON, "--model.name=gpt2"),
}
"""Widths that two and four do not divide, and with tied weights for GPT-2, which has dropout, biases and learned positions."""
WIDER = ("--model.dim=64", "--model.ffn_dim=160")
"""For Float8, whose products take multiples of 16 on each rank."""
KERNELS = "kernels.rms_norm=triton,kernels.rope=triton,kernels.swiglu=triton,kernels.linear_cross_entropy=triton"
"""On a CPU their plain lines. GPT-2 has a place for the last one."""

ALONE = (
    "dp_shard=2",
    "dp_shard=4",
    "dp_replicate=2",
    "dp_replicate=4",
    "tp=2",
    "tp=4",
    "tp=2,async_tp=true",
    "tp=4,async_tp=true",
    "cp=2",
    "cp=4",
    "cp=2,cp_method=allgather",
    "cp=4,cp_method=allgather",
    "cp=2,cp_method=ulysses",
    "cp=4,cp_method=ulysses",
    "pp=2",
    "pp=4",
    "pp=2,pp_schedule=GPipe",
    "pp=4,pp_schedule=GPipe",
    "pp=2,pp_schedule=Interleaved1F1B",
    "pp=4,pp_schedule=Interleaved1F1B",
    "pp=2,pp_schedule=Interleaved1F1B,pp_stages_per_rank=3",
    "pp=2,pp_schedule=InterleavedZeroBubble",
    "pp=4,pp_schedule=InterleavedZeroBubble",
    "pp=2,pp_schedule=ZBVZeroBubble",
    "pp=4,pp_schedule=ZBVZeroBubble",
    "pp=2,pp_schedule=DualPipeV",
    "pp=4,pp_schedule=DualPipeV,training.micro_batch_size=1",
    "pp=2,pp_split=[1,3]",
    "recompute.mode=full",
    "recompute.mode=block,recompute.every=3",
    "recompute.mode=selective",
    "compile.enable=true,compile.backend=aot_eager",
    "data.document_mask=true",
    "data.document_mask=true,data.packing=best_fit",
    "dp_shard=4,data.document_mask=true,data.packing=best_fit",
    "training.micro_batch_size=1",
    "offload.states=true",
    "dp_shard=2,offload.states=true",
    "offload.activations=true",
    "offload.activations=true,recompute.mode=full",
    "offload.activations=true,compile.enable=true,compile.backend=aot_eager",
    "loss.chunk=700,loss.z_loss=0.01",
    "precision.float8=tensorwise",
    "precision.float8=rowwise,precision.float8_skip=[\"layers.0.*.*\"]",
    "precision.float8=tensorwise,compile.enable=true,compile.backend=aot_eager",
    f"dp_shard=2,{KERNELS}",
    f"dp_shard=2,precision.float8=tensorwise,kernels.float8_cast=triton,{KERNELS}",
    f"tp=2,compile.enable=true,compile.backend=aot_eager,{KERNELS}",
)
TOGETHER = (
    "dp_replicate=2,dp_shard=2",
    "dp_shard=2,tp=2",
    "dp_shard=2,tp=2,reshard_after_forward=never",
    "dp_shard=4,reshard_after_forward=2",
    "dp_replicate=2,tp=2",
    "dp_shard=2,cp=2",
    "dp_replicate=2,cp=2",
    "dp_shard=2,pp=2",
    "dp_shard=2,pp=2,reshard_after_forward=always",
    "dp_replicate=2,pp=2",
    "dp_shard=2,pp=2,pp_schedule=InterleavedZeroBubble",
    "dp_replicate=2,pp=2,pp_schedule=ZBVZeroBubble",
    "dp_shard=2,pp=2,pp_schedule=DualPipeV,training.micro_batch_size=1",
    "tp=2,cp=2",
    "tp=2,cp=2,cp_method=ulysses",
    "tp=2,cp=2,cp_method=allgather",
    "tp=2,pp=2",
    "tp=2,pp=2,pp_schedule=ZBVZeroBubble",
    "tp=2,pp=2,pp_schedule=ZBVZeroBubble,async_tp=true",
    "tp=4,pp=2",
    "cp=2,pp=2",
    "cp=2,pp=2,cp_method=ulysses,pp_schedule=Interleaved1F1B",
    "cp=2,pp=4,pp_schedule=GPipe",
    "dp_replicate=2,dp_shard=2,tp=2",
    "dp_replicate=2,dp_shard=2,cp=2",
    "dp_replicate=2,dp_shard=2,pp=2",
    "dp_replicate=2,tp=2,pp=2",
    "dp_shard=2,cp=2,pp=2",
    "dp_shard=2,tp=2,pp=2,pp_schedule=Interleaved1F1B",
    "dp_shard=2,tp=2,cp=2",
    "tp=2,cp=2,pp=2",
    "tp=2,cp=2,pp=2,cp_method=allgather,pp_schedule=InterleavedZeroBubble",
    "tp=2,cp=2,data.document_mask=true",
    "cp=2,cp_method=ulysses,data.document_mask=true",
    "cp=2,cp_method=allgather,data.document_mask=true",
    "tp=2,pp=2,data.document_mask=true",
    "tp=2,pp=2,data.document_mask=true,data.packing=best_fit",
    "dp_replicate=2,cp=2,data.document_mask=true,data.packing=best_fit",
    "dp_shard=2,cp=2,pp=2,data.document_mask=true,pp_schedule=ZBVZeroBubble",
    "dp_shard=2,recompute.mode=full",
    "tp=2,recompute.mode=selective",
    "cp=2,recompute.mode=full",
    "pp=2,recompute.mode=full,pp_schedule=InterleavedZeroBubble",
    "tp=2,pp=2,recompute.mode=block",
    "dp_shard=2,cp=2,recompute.mode=selective,data.document_mask=true",
    "dp_shard=2,compile.enable=true,compile.backend=aot_eager",
    "tp=2,compile.enable=true,compile.backend=aot_eager,recompute.mode=full",
    "tp=2,async_tp=true,compile.enable=true,compile.backend=aot_eager",
    "tp=2,async_tp=true,recompute.mode=selective",
    "cp=2,compile.enable=true,compile.backend=aot_eager",
    "pp=2,compile.enable=true,compile.backend=aot_eager,pp_schedule=Interleaved1F1B",
    "dp_replicate=2,offload.states=true,offload.activations=true",
    "tp=2,pp=2,offload.states=true,pp_schedule=ZBVZeroBubble",
    "cp=2,pp=2,offload.activations=true,recompute.mode=block",
    "dp_replicate=2,dp_shard=2,precision.float8=tensorwise",
    "dp_shard=2,tp=2,precision.float8=tensorwise,compile.enable=true,compile.backend=aot_eager",
    "tp=2,pp=2,precision.float8=rowwise,pp_schedule=ZBVZeroBubble,async_tp=true",
    "dp_shard=2,pp=2,precision.float8=tensorwise,pp_schedule=DualPipeV,training.micro_batch_size=1",
    "dp_shard=2,cp=2,precision.float8=tensorwise,recompute.mode=selective",
    "cp=2,pp=2,precision.float8=rowwise,offload.activations=true",
    f"cp=2,pp=2,pp_schedule=ZBVZeroBubble,{KERNELS}",
    f"tp=2,recompute.mode=selective,offload.states=true,{KERNELS}",
    "tp=2,cp=2,loss.chunk=700,loss.z_loss=0.01",
    'tp=2,pp=2,loss.chunk=700,sharding={"head"="seq"}',
    "tp=2,training.micro_batch_size=1",
    "dp_shard=2,pp=2,training.micro_batch_size=1",
    "training.seq_len=31",
    "pp=2,training.seq_len=31",
    'tp=2,sharding={"layers.*.ffn"="seq","layers.*.ffn.*"="seq"}',
    'tp=2,pp=2,sharding={"embedding"="scatter"}',
)
PLANS = ALONE + TOGETHER
"""Every dimension, schedule and method by itself; every pair of dimensions; triples and quadruples."""
WITHOUT_SLOW = (
    *ALONE,
    "dp_shard=4,reshard_after_forward=2",
    "tp=2,cp=2,pp=2",
    "tp=4,pp=2",
    "tp=2,cp=2,loss.chunk=700,loss.z_loss=0.01",
    "pp=2,training.seq_len=31",
    'tp=2,pp=2,sharding={"embedding"="scatter"}',
)
"""The rest are pairs of features, which test_pairs has."""


def small(data: Path, plan: str, model: str, *words: str) -> Config:
    """debug.toml with a small model under a plan, as `titan verify` would read it."""
    own = ["--model.n_layers=8"] if "pp=4" in plan or "pp_stages_per_rank" in plan else []  # a block for each stage
    own += WIDER if "precision.float8" in plan else []
    plan = plan.replace(KERNELS, "kernels.linear_cross_entropy=triton") if model == "gpt2" else plan
    return planned(plan, [CONFIG, f"--data.path={data}", f"--data.cache={data}", *MODELS[model], *own, *words])
