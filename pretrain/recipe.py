"""What a run is: frozen dataclasses with units in their names. What is impossible: :mod:`pretrain.recipe_checks`.

A recipe is read with :func:`pretrain.recipe_io.load_recipe`. All facts have one owner, and for batch sizes,
learning rate, clipping and precision the owner is here; ``deepspeed_configs/*.json`` says only how to shard.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pretrain.errors import RecipeError
from pretrain.recipe_checks import problems_of


@dataclass(frozen=True, kw_only=True)
class CorpusRecipe:
    """Where documents come from.

    ``embedded`` needs no files: the docstrings of the standard library and of torch. Text files are read as they
    are, the other sources through HF ``datasets``. Globs are relative to the folder the command runs in.
    """

    source: Literal["embedded", "text", "jsonl", "parquet", "hub"] = "embedded"
    train: tuple[str, ...] = ()  # globs of files; hub: names of splits
    valid: tuple[str, ...] = ()  # empty: taken from train, see valid_fraction
    test: tuple[str, ...] = ()
    valid_fraction: float = 0.05  # share of the train documents, chosen by a hash of their text
    test_fraction: float = 0.05
    document_per: Literal["line", "paragraph", "file"] = "line"  # text files only
    text_column: str = "text"  # JSON lines, Parquet and hub
    hub_name: str = ""
    hub_config: str = ""
    streaming: bool = False  # hub: read without storing a copy


@dataclass(frozen=True, kw_only=True)
class TokenizerRecipe:
    """SentencePiece, trained on the train split or given."""

    model_type: Literal["bpe", "unigram"] = "bpe"
    vocab_size: int = 8192
    byte_fallback: bool = True
    model_file: str = ""  # a trained .model to use as it is; then the fields above say nothing
    training_sentences: int = 2_000_000  # at most this many lines are sampled for training it


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    folder: str  # where ``prepare`` puts the tokenizer, the shards and their manifest
    corpus: CorpusRecipe = field(default_factory=CorpusRecipe)
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    prepare_processes: int = 2


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """A decoder: ``gpt2`` (learned positions, LayerNorm, GELU, biases) or ``llama`` (RoPE, RMSNorm, SwiGLU)."""

    style: Literal["gpt2", "llama"] = "gpt2"
    num_layers: int = 4
    hidden_size: int = 128
    num_attention_heads: int = 4
    num_query_groups: int | None = None  # None: as many as heads; fewer: grouped queries
    ffn_hidden_size: int | None = None  # None: 4 x hidden (gpt2), 8/3 x hidden rounded up to 64 (llama)
    sequence_length: int = 256  # tokens
    tied_embeddings: bool | None = None  # None: tied for gpt2, untied for llama
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    init_std: float = 0.02
    norm_epsilon: float = 1e-5
    rope_base: int = 10_000
    vocab_multiple_of: int = 128  # rows are padded to it, whatever the tensor-parallel degree
    activation_checkpointing: Literal["none", "full"] = "none"
    logit_soft_cap: float = 0.0  # logits are cap * tanh(logits / cap), as in Gemma 2, whose cap is 30; 0: as they are
    init_from: str = ""  # a Hugging Face folder whose weights the run starts with; empty: drawn from the seed

    @property
    def query_groups(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        if self.style == "gpt2":
            return 4 * self.hidden_size
        return -(-8 * self.hidden_size // (3 * 64)) * 64

    @property
    def tied(self) -> bool:
        return self.style == "gpt2" if self.tied_embeddings is None else self.tied_embeddings


@dataclass(frozen=True, kw_only=True)
class ObjectiveRecipe:
    """``mle`` is the plain cross-entropy, ``agg`` the same with gated output-embedding gradients.

    How the rare rows of ``agg`` are treated until ``switch_step`` and after it (arXiv 2109.03127, section 3 and its
    ablations): ``gate`` as the method says; ``block`` with gates of 0, so that only a row's own targets train it;
    ``freeze`` so that nothing moves the row, and if tied neither does the input side; ``train`` as plain training.
    """

    method: Literal["mle", "agg"] = "agg"
    alpha: float | None = None  # rare: fewer occurrences per reference_batch_tokens; None: 0.03, or by rare_fraction
    rare_fraction: float | None = None  # this share of the ids that have occurred is rare
    reference_batch_tokens: int = 32_768
    window: Literal["sliding", "exponential"] = "sliding"
    window_steps: int | None = None  # optimizer steps that are counted; None: one epoch
    never_seen: Literal["gate", "exclude"] = "gate"  # ids that do not occur in the train shards
    gates: Literal["both", "g1", "g2"] = "both"  # which of them gate and block; the other is open
    rare_rows: Literal["gate", "block", "freeze", "train"] = "gate"
    switch_step: int | None = None  # from this step on, the first being 1, rare rows are treated as follows
    rare_rows_after: Literal["gate", "block", "freeze", "train"] | None = None
    label_smoothing: float = 0.0
    # What others do against degeneration, alone or beside AGG; 0: off. None is part of the loss that is reported.
    z_loss: float = 0.0  # times log^2 Z of each position (PaLM: 1e-4)
    cosine_penalty: float = 0.0  # times the mean cosine of the output embedding's rows (CosReg: 1)
    mean_penalty: float = 0.0  # times the square of their mean row (mu-loss: 1e-4)
    center_rows: bool = False  # their mean row is subtracted after each update (mu-centering)

    @property
    def effective_alpha(self) -> float | None:
        """The paper's 0.03 where nothing is given; None where ``rare_fraction`` decides."""
        return 0.03 if self.alpha is None and self.rare_fraction is None else self.alpha


@dataclass(frozen=True, kw_only=True)
class BatchRecipe:
    micro_batch_size: int = 8  # sequences on one rank at a time
    global_batch_size: int = 8  # sequences per optimizer step, all ranks together
    train_steps: int = 500  # optimizer steps


@dataclass(frozen=True, kw_only=True)
class OptimizerRecipe:
    """AdamW. Biases, norms and other vectors are not decayed."""

    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    gradient_clipping: float = 1.0  # global norm; 0: none
    couple_embeddings: bool = False  # rows of the output embedding share one second moment (Coupled Adam)


@dataclass(frozen=True, kw_only=True)
class ScheduleRecipe:
    kind: Literal["cosine", "inverse_sqrt", "constant", "warmup_stable_decay"] = "cosine"
    warmup_steps: int = 0  # linear from 0
    decay_steps: int | None = None  # cosine: None: all; warmup_stable_decay: the last so many
    min_learning_rate_ratio: float = 0.1  # of the peak, at the end of the decay


@dataclass(frozen=True, kw_only=True)
class ParallelRecipe:
    tensor_model_parallel_size: int = 1
    data_parallel_size: int | None = None  # None: what the launcher started; 1 when nothing did
    sharding: str = "zero1"  # a file of deepspeed_configs/, or a path


@dataclass(frozen=True, kw_only=True)
class CheckpointRecipe:
    every_steps: int = 0  # 0: only at the end
    keep_last: int = 2  # the last so many; older ones are deleted
    keep_every_steps: int = 0  # except those of every so many steps; 0: none
    background: bool = True  # written while training goes on, from a copy in host memory


@dataclass(frozen=True, kw_only=True)
class SpikesRecipe:
    """Steps that are not trained on; what skip and rollback mean is in :mod:`pretrain.training.spikes`."""

    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"  # loss or gradient
    on_outlier: Literal["stop", "skip", "rollback"] = "skip"
    loss_factor: float = 0.0  # outlier: a loss above so many times its median over the window; 0: none is
    grad_norm_factor: float = 0.0  # the same of the gradient norm before clipping
    window_steps: int = 100  # last trained steps; before so many there is no outlier
    max_in_a_row: int = 10  # steps skipped, or rollbacks with no new checkpoint between them, before training stops


@dataclass(frozen=True, kw_only=True)
class ReportingRecipe:
    log_every_steps: int = 10
    geometry_every_steps: int = 50  # the embedding's shape, gates, loss by frequency: pretrain.training.metrics
    validate_every_steps: int = 100
    validation_sequences: int = 64  # the first so many of the valid split; 0: all
    tensorboard: bool = True  # where it is installed
    word_similarity: tuple[str, ...] = ()  # files of "word TAB word TAB score" lines, for evaluate


@dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str
    data: DataRecipe
    seed: int = 1234
    output_root: str = "runs"
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: GPUs where there are any
    hang_timeout_minutes: float = 10.0  # of one step, three times as long for the first and for saves; 0: none
    model: ModelRecipe = field(default_factory=ModelRecipe)
    objective: ObjectiveRecipe = field(default_factory=ObjectiveRecipe)
    batch: BatchRecipe = field(default_factory=BatchRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    parallel: ParallelRecipe = field(default_factory=ParallelRecipe)
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    spikes: SpikesRecipe = field(default_factory=SpikesRecipe)
    reporting: ReportingRecipe = field(default_factory=ReportingRecipe)

    @property
    def run_folder(self) -> Path:
        return Path(self.output_root) / self.name

    @property
    def tokens_per_step(self) -> int:
        return self.batch.global_batch_size * self.model.sequence_length

    @property
    def local_world_size(self) -> int:
        """Ranks that ``train`` starts by itself when no launcher did."""
        return self.parallel.tensor_model_parallel_size * (self.parallel.data_parallel_size or 1)

    def check(self, where: str = "the recipe") -> None:
        """Raise RecipeError with every impossible value and combination, all at once."""
        problems = problems_of(self)
        if problems:
            raise RecipeError(problems, where)
