"""``python -m pretrain evaluate HF_FOLDER --data RECIPE``: a published model, by the measures of a run.

The text is that of the recipe's corpus, in the model's own tokens: the test split is predicted, the train split gives
the frequency groups and says which ids are never seen. As in our shards an end-of-sequence token follows each
document. The recipe also gives the window (``model.sequence_length``), ``batch.micro_batch_size``, ``precision``,
``device`` and the files of word pairs. One process.

Letters: B texts, L window, V ids of the tokenizer. Rows that the model has beyond them take no part in anything.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from agg import VocabShard
from pretrain.checkpointing.huggingface.files import missing_packages
from pretrain.console import bar
from pretrain.data.corpus import Split, documents
from pretrain.data.windows import IGNORED_TARGET, TokenStream
from pretrain.errors import UserError
from pretrain.evaluation.evaluate import SPLIT, write_evaluation
from pretrain.evaluation.measures import measure
from pretrain.evaluation.subject import Embedding, Subject
from pretrain.evaluation.word_similarity import read_encoded, words_in_text
from pretrain.recipe import Recipe
from pretrain.run_folder import EVALUATION_FORMAT, RunFolder
from pretrain.versions import versions

Ids = npt.NDArray[np.int64]
DOCUMENTS_AT_ONCE = 256
NOT_TRAINED_HERE = (
    "tokens_per_second", "seconds", "world_size", "tensor_model_parallel_size", "data_parallel_size", "sharding",
    "hardware",
)  # fmt: skip


def evaluate_huggingface(folder: Path, recipe: Recipe, output: Path) -> None:
    """Measure the model of a folder on the corpus of a recipe, and write the evaluation to ``output``.

    Raises:
        UserError: the folder has no causal language model or no tokenizer, the window is longer than the model can
            see, or packages, the corpus or a file of word pairs cannot be used.
    """
    tokens = HuggingFaceTokens(folder)
    files = [Path(name) for name in recipe.reporting.word_similarity]
    for path in files:
        read_encoded(path, words_in_text(tokens))
    on_gpu = recipe.device != "cpu" and torch.cuda.is_available()
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    model = HuggingFaceModel(folder, tokens.vocab_size, dtype, torch.device("cuda" if on_gpu else "cpu"))
    window = recipe.model.sequence_length
    if model.longest_window is not None and window > model.longest_window:
        raise UserError(
            f"model.sequence_length is {window}, but the model in {folder} sees {model.longest_window} tokens at most: "
            f"give model.sequence_length={model.longest_window} or less"
        )
    counts = np.zeros(tokens.vocab_size, dtype=np.int64)
    for ids, _ in tokens.documents(recipe, "train"):
        counts += np.bincount(ids, minlength=tokens.vocab_size)
    stream, text_bytes = _stream(tokens, recipe)
    subject = Subject(
        model=model,
        codec=tokens,
        text=stream,
        text_bytes=text_bytes,
        token_counts=torch.from_numpy(counts),
        window=window,
        micro_batch_size=recipe.batch.micro_batch_size,
        show=True,
    )
    found, arrays = measure(subject, files)
    evaluation = {
        "format": EVALUATION_FORMAT,
        "run": folder.resolve().name,
        **dict.fromkeys(("method", "seed", "checkpoint_step", "tokens")),
        "split": SPLIT,
        **found,
        **model.parameters(),
        "training": {
            **dict.fromkeys(NOT_TRAINED_HERE),
            "precision": recipe.precision,
            "versions": versions() | {"transformers": _transformers().__version__},
        },
    }
    where = RunFolder(output)
    write_evaluation(evaluation, arrays, where.evaluation_file, where.evaluation_arrays)


class HuggingFaceTokens:
    """The tokenizer of a folder, as a :class:`pretrain.evaluation.subject.Codec`; nothing is added to a text.

    Raises:
        UserError: there is none, it has no end-of-sequence token, or packages are missing.
    """

    def __init__(self, folder: Path) -> None:
        transformers = _transformers()
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # each kind of tokenizer has its own
            raise UserError(f"{folder} has no tokenizer that transformers can load: {_first_line(error)}") from error
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values())  # len() counts tokens, and ids may have gaps
        self.unk_id: int | None = self._tokenizer.unk_token_id
        if not self.encode("a"):
            raise UserError(f"{folder} has no tokenizer: put the files there that AutoTokenizer loads")
        if self._tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer of {folder} has no end-of-sequence token to end documents with")

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def piece(self, token_id: int) -> str:
        return str(self._tokenizer.convert_ids_to_tokens(token_id))

    def documents(self, recipe: Recipe, split: Split) -> Iterator[tuple[Ids, int]]:
        """Ids of some documents, each with its end, and their bytes of UTF-8, until the split ends."""
        texts: list[str] = []
        with bar(None, f"tokenizing {split}", "documents") as progress:
            for text in documents(recipe.data.corpus, split):
                texts.append(text)
                progress.update()
                if len(texts) == DOCUMENTS_AT_ONCE:
                    yield self._ids(texts)
                    texts = []
        if texts:
            yield self._ids(texts)

    def _ids(self, texts: list[str]) -> tuple[Ids, int]:
        end = self._tokenizer.eos_token_id
        encoded = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        ids = np.array([i for document in encoded for i in (*document, end)])
        return ids, sum(len(text.encode("utf-8")) for text in texts)


class HuggingFaceModel:
    """A :class:`pretrain.evaluation.subject.LanguageModel` of transformers, in one process.

    Raises:
        UserError: the folder has none, a part of it, or one that sees tokens to come.
    """

    def __init__(self, folder: Path, vocab_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.device, self._vocab_size = device, vocab_size
        try:
            model, report = _transformers().AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, dtype=dtype, output_loading_info=True
            )
        except Exception as error:  # of the configuration, of the weights, of what they need
            raise UserError(
                f"{folder} has no causal language model that transformers can load: {_first_line(error)}"
            ) from error
        if report["missing_keys"]:
            missing = ", ".join(sorted(report["missing_keys"])[:3])
            raise UserError(f"{folder} lacks weights of its model, which would be random: {missing} ...")
        self._model = model.to(device).eval()
        _compute_logits_in_float32(model.get_output_embeddings())
        self._output, self._input = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        if min(len(self._output), len(self._input)) < vocab_size:
            raise UserError(
                f"the tokenizer of {folder} has {vocab_size} ids, its model {len(self._output)}: they do not belong "
                "together"
            )
        # Only the last logits, where the model knows how not to compute the others.
        arguments = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in arguments else {}
        self._check_finite(folder)
        self._check_causal(folder)

    @property
    def longest_window(self) -> int | None:
        """Tokens that it has positions for; None: it does not say."""
        longest = getattr(self._model.config, "max_position_embeddings", None)
        return longest if isinstance(longest, int) else None

    def parameters(self) -> dict[str, int]:
        """How many, and how many are in no embedding, of tokens or of positions."""
        embeddings = [layer.weight for layer in self._model.modules() if isinstance(layer, torch.nn.Embedding)]
        inside = {id(weight): weight.numel() for weight in (*embeddings, self._output)}
        total = sum(parameter.numel() for parameter in self._model.parameters())
        return {"parameters": total, "parameters_without_embeddings": total - sum(inside.values())}

    def token_losses(self, tokens: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        targets = targets.flatten()
        kept = targets != IGNORED_TARGET
        logits = self._model(tokens, use_cache=False).logits.flatten(0, 1)[kept, : self._vocab_size].float()
        losses, predictions = torch.zeros(targets.shape, device=self.device), torch.zeros_like(targets)
        losses[kept] = torch.nn.functional.cross_entropy(logits, targets[kept], reduction="none")
        predictions[kept] = logits.argmax(1)
        return losses, predictions

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self._model(tokens, use_cache=False, **self._last_only).logits[:, -1, : self._vocab_size]
        return torch.as_tensor(logits).float()

    def agree(self, chosen: torch.Tensor) -> torch.Tensor:
        return chosen

    @contextmanager
    def output_embedding(self) -> Iterator[Embedding]:
        yield self._embedding(self._output)

    def input_embedding(self) -> AbstractContextManager[Embedding] | None:
        return None if self._input is self._output else self._inputs()

    @contextmanager
    def _inputs(self) -> Iterator[Embedding]:
        yield self._embedding(self._input)

    def _embedding(self, weight: torch.Tensor) -> Embedding:
        return Embedding(weight.detach(), VocabShard(0, len(weight), self._vocab_size))

    @torch.no_grad()
    def _check_finite(self, folder: Path) -> None:
        found = [*(weight[: self._vocab_size] for weight in (self._output, self._input)), self._some_logits()]
        if not all(bool(values.isfinite().all()) for values in found):
            raise UserError(
                f"{folder} has a model whose embeddings or logits are not finite: get its files again, or measure it "
                "with precision=fp32"
            )

    @torch.no_grad()
    def _check_causal(self, folder: Path) -> None:
        """transformers also loads masked language models as causal ones; their perplexity would mean nothing."""
        first, second = self._some_logits(), self._some_logits(last=self._vocab_size // 2)
        if not torch.allclose(first, second, rtol=1e-4, atol=1e-4 * float(first.abs().max())):
            raise UserError(f"{folder} has a model that sees the tokens to come: it is not a causal language model")

    def _some_logits(self, last: int | None = None) -> torch.Tensor:
        """[7, V]: after each of eight tokens but the last, which may be another. The lowest ids are often special, and
        hidden from a model that looks for its padding."""
        tokens = (self._vocab_size // 2 + torch.arange(8, device=self.device)[None]) % self._vocab_size
        if last is not None:
            tokens[0, -1] = last
        logits = self._model(tokens, use_cache=False).logits[0, :-1, : self._vocab_size]
        return torch.as_tensor(logits).float()


def _compute_logits_in_float32(head: torch.nn.Module) -> None:
    """As a run computes them: products in bfloat16 tie, and the lower id, which is more frequent, would win each time.

    The copy is made once and is no part of the model, whose embeddings may be tied; caps and scales come after it.
    """
    if any(parameter.dtype != torch.float32 for parameter in head.parameters()):
        exact = copy.deepcopy(head).float()
        head.forward = lambda hidden: exact(hidden.float())


def _stream(tokens: HuggingFaceTokens, recipe: Recipe) -> tuple[TokenStream, int]:
    """The test split in memory, and its bytes."""
    parts = list(tokens.documents(recipe, SPLIT))
    ids = torch.from_numpy(np.concatenate([part for part, _ in parts]))
    name = f"the {SPLIT} split of data.corpus"
    return TokenStream(name, len(ids), 0, lambda start, count: ids[start : start + count]), sum(n for _, n in parts)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise missing_packages(error) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
