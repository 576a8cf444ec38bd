"""What a run leaves on disk, and how it survives being killed.

Knows: the run folder, its files and the shape of each; writing a file atomically; skipping a stage whose inputs have not
changed. Does not know: what any stage computes.

A run folder::

    recipe.yaml            the recipe as resolved
    environment.json       versions, machine, hashes of the inputs
    stages/NAME.json       one per finished stage: the fingerprint of its inputs, and its cost
    data.json              DataSummary: shape found, counts, what was dropped and why
    data/*.jsonl           the records of each split
    base_evaluation.json   Evaluation of the base
    scores.json            per-block scores of the parameter method, where it has them
    selection.safetensors  which entries of which weights may change
    metrics.jsonl          one line per logged step
    checkpoints/           what training resumes from
    specialist/            the result: an adapter in PEFT's format, or the changed tensors
    trained/               what training left, where the recipe finishes it (finish.json says what came of that)
    evaluation.json        Evaluation of the specialist
    verdict.json           Verdict: every difference with its interval
    samples.json           answers before and after
    report.html            all of it, for a person
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from selectune import recipe as recipes
from selectune.errors import UserError
from selectune.meter import Cost, Meter


class Written(BaseModel):
    """A thing with a file of its own in the run folder."""

    model_config = ConfigDict(extra="forbid")


class Dropped(Written):
    """Records that were not used, and why."""

    reason: Literal["exact duplicate", "near duplicate", "contamination", "empty response", "too long", "limit", "unreadable"]
    count: int
    examples: list[str] = Field(default_factory=list)
    """Up to three, shortened, each with its file and line."""


class DataSummary(Written):
    """What the data was found to be, and what became of it."""

    files: list[str]
    hashes: dict[str, str]
    """sha256 of every input file, by path."""
    shape: str
    columns: dict[str, str]
    read: int
    dropped: list[Dropped]
    splits: dict[str, int]
    """Records in train, dev and test."""
    tokens: dict[str, int] = Field(default_factory=dict)
    """Tokens in the train split: ``all``, ``response``, ``sequences`` (packed), ``padding``."""
    contamination: dict[str, int] = Field(default_factory=dict)
    """Training records that overlap with each evaluation set."""
    example: str = ""
    """The first training record as the model sees it."""
    warnings: list[str] = Field(default_factory=list)


class Item(Written):
    """One question of one benchmark, and what a model made of it."""

    id: str
    value: float
    """1 or 0 for accuracy; a mean negative log-likelihood in nats per token for perplexity and cross-entropy."""
    prediction: str = ""
    target: str = ""
    prompt: str = ""
    """What was asked, shortened to 400 characters."""


class Benchmark(Written):
    """One benchmark's items under one model."""

    name: str
    """For instance ``target``, ``probe/arithmetic``, ``hellaswag``, ``forgetting/cross_entropy``."""
    role: Literal["target", "general", "forgetting"]
    metric: str
    """``accuracy``, ``accuracy_normalised``, ``exact_match``, ``macro_f1``, ``answer_nll``, ``cross_entropy``, ``kl``, ``top1_agreement``."""
    higher_is_better: bool
    items: list[Item]
    score: float
    """The metric over all items (the mean of the values, but for macro-F1)."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Few-shot count, file, number of items in the whole set, chance level, ..."""


class Evaluation(Written):
    """Everything measured on one model, base or specialist; the same items in the same order for both."""

    model: str
    benchmarks: list[Benchmark]


class Difference(Written):
    """One benchmark before and after, paired by item."""

    benchmark: str
    role: Literal["target", "general", "forgetting"]
    metric: str
    higher_is_better: bool
    items: int
    before: float
    after: float
    difference: float
    """after - before."""
    low: float
    high: float
    """Paired bootstrap interval of the difference."""
    p_value: float | None = None
    """Exact McNemar for accuracy, sign-flip permutation otherwise; two-sided."""
    p_corrected: float | None = None
    """Holm's correction over the general benchmarks."""
    smallest_detectable_drop: float | None = None
    """The smallest drop that this many items would have shown with 80 % power at the corrected level."""
    flipped_to_right: int = 0
    flipped_to_wrong: int = 0
    verdict: Literal["gained", "nothing lost", "lost", "too few items to say", "no clear gain", "measured"]


class Verdict(Written):
    """The two facts a user needs."""

    gained: Literal["gained", "no clear gain", "lost", "not measured"]
    retained: Literal["nothing lost", "lost", "too few items to say", "not measured"]
    headline: str
    """One or two plain sentences."""
    differences: list[Difference]
    confidence: float
    tolerance: float


class Sample(Written):
    """One target question answered by the base and by the specialist."""

    id: str
    prompt: str
    target: str
    before: str
    after: str


class BlockScore(Written):
    """The score of one block, and whether it trains."""

    block: int
    score: float | None
    trained: bool


class Scores(Written):
    """What the parameter method saw and chose."""

    method: dict[str, Any]
    """The method's description as a recipe writes it."""
    form: dict[str, Any]
    blocks: list[BlockScore]
    trained_parameters: int
    total_parameters: int
    examples: int = 0
    """Examples that the scores were computed on."""
    notes: list[str] = Field(default_factory=list)
    """What a person should know of the choice, a sentence each."""


class Stage(Written):
    """A finished stage."""

    name: str
    fingerprint: str
    cost: Cost


Model = TypeVar("Model", bound=BaseModel)


def fingerprint(value: Any) -> str:
    """Return a hash of any JSON-like value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def hash_file(path: str | Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def folder_atomically(path: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes ``path`` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


class Run:
    """A run folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @classmethod
    def create(cls, folder: str | Path, recipe: recipes.Recipe) -> Run:
        """Make a run folder for a recipe; an existing one with the same recipe is taken up again.

        Raises:
            UserError: the folder cannot be written, or holds another recipe's run.
        """
        run = cls(folder)
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            text = recipes.dump(recipe)
            if run.path("recipe.yaml").exists():
                if run.recipe != recipe:
                    raise UserError("holds a run of another recipe", file=folder, mend="name another --output")
            elif any(run.folder.iterdir()):
                raise UserError("is not empty and holds no run", file=folder, mend="name another --output")
            else:
                write_atomically(run.path("recipe.yaml"), text)
        except OSError as error:
            raise UserError(
                f"cannot be written ({error.strerror})", file=folder, mend="name another --output, or free space"
            ) from None
        return run

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Open an existing run.

        Raises:
            UserError: the folder holds no run.
        """
        run = cls(folder)
        if not run.path("recipe.yaml").is_file():
            raise UserError("holds no run", file=folder, expected="a folder with a recipe.yaml", mend="see `selectune runs`")
        return run

    @property
    def recipe(self) -> recipes.Recipe:
        return recipes.load(self.path("recipe.yaml"))

    @property
    def name(self) -> str:
        return self.folder.name

    def path(self, *parts: str) -> Path:
        return self.folder.joinpath(*parts)

    def write(self, file: str, value: BaseModel | list[Any] | dict[str, Any]) -> None:
        """Write a value as JSON, atomically."""
        plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
        write_atomically(self.path(file), json.dumps(plain, indent=1, ensure_ascii=False))

    def read(self, file: str, kind: type[Model]) -> Model:
        """Read a value written by :meth:`write`.

        Raises:
            UserError: the file is missing (the stage has not run) or was changed by hand.
        """
        path = self.path(file)
        if not path.is_file():
            raise UserError("is not there yet", file=path, mend=f"finish the run with `selectune resume {self.folder}`")
        try:
            return kind.model_validate_json(path.read_bytes())
        except ValueError as error:
            raise UserError(f"cannot be read ({str(error).splitlines()[0]})", file=path) from None

    def records(self, split: str) -> Path:
        """Return the file of a split's records; of the training split those that were chosen."""
        chosen = self.path("data", "chosen.jsonl")
        return chosen if split == "train" and chosen.exists() else self.path("data", f"{split}.jsonl")

    def has(self, file: str) -> bool:
        return self.path(file).exists()

    def stage(self, name: str, inputs: Any, work: Callable[[Meter], None]) -> bool:
        """Run ``work`` unless this stage has already ended with the same inputs; return whether it ran."""
        print_of_inputs = fingerprint(inputs)
        marker = f"stages/{name}.json"
        if self.ended(name, inputs):
            return False
        so_far = self.path("stages", f"{name}-{print_of_inputs[:8]}.part")
        so_far.parent.mkdir(exist_ok=True)
        with Meter(name, so_far) as meter:
            work(meter)
        self.write(marker, Stage(name=name, fingerprint=print_of_inputs, cost=meter.cost))
        so_far.unlink(missing_ok=True)
        return True

    def ended(self, name: str, inputs: Any) -> bool:
        """Whether a stage has ended with these inputs."""
        marker = f"stages/{name}.json"
        return self.has(marker) and self.read(marker, Stage).fingerprint == fingerprint(inputs)

    def finished(self, name: str) -> bool:
        return self.has(f"stages/{name}.json")

    def costs(self) -> list[Cost]:
        """Return the cost of every finished stage, in the order of the chain."""
        stages = [self.read(f"stages/{path.name}", Stage) for path in self.path("stages").glob("*.json")]
        return [stage.cost for stage in sorted(stages, key=lambda stage: _CHAIN.index(stage.name))]


_CHAIN = ("prepare", "measure_base", "choose_examples", "choose", "train", "finish", "measure_specialist", "judge", "report")
STAGES = tuple(name for name in _CHAIN if name not in ("choose_examples", "finish"))
"""The stages of every run."""
