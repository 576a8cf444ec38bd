"""The whole run as data: what a user may say, with a default for everything.

Knows: the keys of a recipe, their defaults and their documentation; reading and writing YAML; the JSON schema; how to
refuse an unknown key with the nearest known one. Does not know: what any stage does with it.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from selectune.errors import UserError, nearest

Checked = TypeVar("Checked", bound=BaseModel)
MethodChoice = str | dict[str, Any]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=0.5)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True, use_attribute_docstrings=True)


class DataRecipe(Section):
    """What the records are, and what is done to them before training."""

    train: str | list[str] | None = None
    """A file, a folder, a glob, a hub id, or a list of these."""
    test: str | list[str] | None = None
    """Records of the target that measure the gain. Left out: a part of the training data is held out for it."""
    target: str | list[str] | None = None
    """Records of the target that choosing examples may look at (never those of the test). Left out: the development records."""
    shape: Literal[
        "auto",
        "chat",
        "sharegpt",
        "prompt_completion",
        "instruction",
        "question_answer",
        "choice",
        "classification",
        "text",
    ] = "auto"
    """The shape of the records; ``auto`` finds it and shows it before training."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Which column holds which role, for instance ``{question: Question, answer: Answer}``; always wins over what is found."""
    labels: list[str] | None = None
    """The labels or choices that are allowed, for classification; left out: those that occur."""
    system: str | None = None
    """A system message put before every conversation that has none."""
    dev_fraction: Fraction = 0.05
    """Share of the training records, by hash of their content, on which checkpoints are compared."""
    test_fraction: Fraction = 0.1
    """Share held out as the target's test when ``test`` is left out."""
    max_length: Annotated[int, Field(ge=16)] = 512
    """Tokens in one packed sequence, and the longest record."""
    long_records: Literal["split", "drop", "truncate"] = "split"
    """Records longer than ``max_length``: raw text is split; a conversation is truncated at the end of its response."""
    packing: bool = True
    """Fill each sequence with several records that cannot see each other. Off: each record is a sequence, in batches of like length."""
    deduplicate: Literal["near", "exact", "off"] = "near"
    """Drop records that are equal, or nearly so, to an earlier one."""
    contamination: Literal["remove", "report", "off"] = "remove"
    """Training records that overlap with an evaluation set of the run (equal, or sharing a 13-word sequence)."""
    engine: Literal["local", "ray"] = "local"
    """Where the signals by which records are chosen are measured: in this process, or on the machines of a Ray cluster."""
    limit: Positive | None = None
    """Use at most this many training records, chosen by hash of their content, and the same share of the development records."""


class TrainingRecipe(Section):
    """How the training runs."""

    epochs: Annotated[float, Field(gt=0)] = 3.0
    """Passes over the training records."""
    max_steps: Positive | None = None
    """Stop after this many optimiser steps, whatever ``epochs`` says."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate. Left out: the form's own default (LoRA 1e-3, in place 1e-4, single entries in place 1e-3, for AdamW and a model of
    this size)."""
    optimiser: Literal["adamw", "adamw_8bit", "adafactor", "lion", "lion_8bit", "sgd"] = "adamw"
    """AdamW keeps 8 bytes a trained weight, its 8-bit form 2, Adafactor almost none, Lion 4 (and wants a third to a tenth of AdamW's
    learning rate), plain SGD none."""
    schedule: Literal["cosine", "linear", "warmup_stable_decay", "constant"] = "cosine"
    """How the learning rate changes after the warm-up."""
    warmup_fraction: Fraction = 0.05
    """Share of the steps over which the learning rate rises."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the steps over which ``warmup_stable_decay`` falls."""
    batch_sequences: Positive = 4
    """Packed sequences in one optimiser step."""
    micro_batch_sequences: Positive | Literal["auto"] = 2
    """Packed sequences in one forward pass; the rest of the batch is accumulated. ``auto``: the most that are of use and fit the memory."""
    processes: Positive = 1
    """Processes that train together on this machine, each on its share of every batch, with a share of the cores. Meant for several
    accelerators or sockets: on two cores one process of two threads is the faster. A launcher's processes are used whatever this says."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay, on what trains and nothing else."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW and Lion."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the gradient of what trains."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Compute in bf16 with fp32 accumulation and fp32 trained weights, or all in fp32. ``auto``: bf16 where the machine has it."""
    prefix_cache: bool = True
    """Compute the frozen first blocks once for each sequence and keep what comes out of them; off by itself where they are not
    frozen or dropout is on."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    step_in_backward: bool = False
    """Step each parameter in the backward pass, as soon as its gradient is there, and free the gradient: no memory for gradients. Needs
    ``micro_batch_sequences`` equal to ``batch_sequences`` and ``clip_norm: null``."""
    evaluations: Annotated[int, Field(ge=0)] = 4
    """How often the development loss is measured (and a checkpoint written) in the run."""
    early_stop: Positive | None = None
    """Stop after this many evaluations without a better development loss."""
    keep_best: bool = True
    """End with the checkpoint of the lowest development loss instead of the last one. Methods that follow a schedule to its end, or
    heed a cost that this loss does not count, always end with the last, and are not stopped early."""
    save_minutes: Annotated[float, Field(gt=0)] | None = None
    """Also write a checkpoint every so many minutes, for long runs."""
    save_steps: Positive | None = None
    """Also write a checkpoint every so many steps."""
    report_to: list[str] = Field(default_factory=list)
    """Trackers of the ecosystem: ``tensorboard``, ``wandb``, ``mlflow``, ...; none by default."""


class BudgetRecipe(Section):
    """Limits that are planned for before training starts."""

    minutes: Annotated[float, Field(gt=0)] | None = None
    """Training time on this machine; turned into a number of steps after a short measurement."""
    memory_gib: Annotated[float, Field(gt=0)] | None = None
    """Largest memory of training, in GiB; left out: what the machine has. A run that would need more is refused before it starts."""
    tokens: Positive | None = None
    """Training tokens, prompts included."""


class EvaluationRecipe(Section):
    """How gain and loss are measured, before and after."""

    target: Literal["auto", "choice", "exact_match", "classification", "perplexity", "off"] = "auto"
    """The metric of the target; ``auto`` chooses by the shape of the data."""
    target_items: Positive | None = 200
    """At most this many target items, the first by hash of their content."""
    benchmarks: list[str] = Field(default_factory=lambda: ["probe"])
    """General benchmarks: probe, hellaswag, gsm8k, mmlu_cs, mmlu_computer_science, arc_easy, arc_challenge, piqa, winogrande, boolq, lambada."""
    items: Positive | dict[str, Positive] | None = 200
    """At most this many items of each benchmark (of each subject of MMLU), the first in the file; null for all; or a number for
    some by name, such as {gsm8k: 50}, and 200 for the others."""
    few_shot: Annotated[int, Field(ge=0)] | None = None
    """Examples before each question; left out: the task's own default."""
    data_root: str | None = None
    """Folder with local copies of the benchmarks; left out: the hub."""
    forgetting: bool = True
    """Measure drift from the base on general text and prompts: cross-entropy, KL divergence, top-1 agreement."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Of every interval."""
    tolerance: Annotated[float, Field(ge=0)] = 0.03
    """The largest drop of accuracy that still counts as nothing lost, when the items suffice to exclude a larger one."""
    require_retention: bool = False
    """Exit with status 3 when the verdict is *lost*."""
    samples: Annotated[int, Field(ge=0)] = 12
    """Target answers written out before and after."""
    max_new_tokens: Positive = 64
    """Length limit of the answers written out, and of exact match."""


class Recipe(Section):
    """The whole run."""

    name: str | None = None
    """A short name for the run; left out: made from the data and the method."""
    base: str = "smollm2-135m-instruct"
    """The base model: a built-in name, a local transformers folder, a GGUF file, or a hub id."""
    trust_remote_code: bool = False
    """Allow a hub model to run its own code. Off unless you trust its author."""
    data: DataRecipe = Field(default_factory=DataRecipe)
    examples: MethodChoice | None = None
    """Which records train; ``selectune methods examples`` lists the answers. Left out: of a large pool those that leave
    least uncertainty about the target, where ``data.target`` names records of it; all otherwise."""
    parameters: MethodChoice = "all"
    """Which weights may change; ``selectune methods parameters`` lists the answers."""
    form: MethodChoice = "lora"
    """In which form they change; ``selectune methods adapters`` lists the answers. Left out: the form that the choice of weights is made for,
    in place (``full``) for single entries, rows, heads and matrices, LoRA for everything and for whole blocks."""
    objective: MethodChoice = "cross_entropy"
    """By which loss; ``selectune methods objectives`` lists the answers."""
    policy: MethodChoice = "none"
    """What acts while the model trains; ``selectune methods policies`` lists the answers."""
    finish: MethodChoice = "none"
    """What is kept of the training; ``selectune methods merging`` lists the answers."""
    training: TrainingRecipe = Field(default_factory=TrainingRecipe)
    budget: BudgetRecipe = Field(default_factory=BudgetRecipe)
    evaluation: EvaluationRecipe = Field(default_factory=EvaluationRecipe)
    output: str = "runs"
    """Folder that holds the runs."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of everything random."""

    @model_validator(mode="before")
    @classmethod
    def _in_its_form(cls, values: Any) -> Any:
        """Where weights are chosen and no form is named, name the form that the choice is made for."""
        chosen = values.get("parameters") if isinstance(values, dict) and "form" not in values else None
        name = chosen.get("method") if isinstance(chosen, dict) else str(chosen).split(":")[0]
        if chosen is None or name == "all":
            return values
        from selectune import catalogue

        known: Any = catalogue.methods("parameters").get(str(name))
        return values if known is None else {**values, "form": known.usual_form}


def parse(values: dict[str, Any], file: str | Path | None = None) -> Recipe:
    """Check a recipe's values.

    Raises:
        UserError: an unknown key (with the nearest known one) or a wrong value, with its place.
    """
    return check(Recipe, values, file, mend="see `selectune recipe --schema` for every key")


def check(model: type[Checked], values: dict[str, Any], file: str | Path | None = None, mend: str | None = None) -> Checked:
    """Make a model of the values of a YAML file.

    Raises:
        UserError: an unknown key (with the nearest known one) or a wrong value, with its file and line.
    """
    _refuse_unknown(values, model, (), file)
    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        path = tuple(str(part) for part in first["loc"] if not str(part).startswith(("str", "list[", "dict[")))
        raise UserError(
            f"{first['msg']}, not {first.get('input')!r}", file=file, line=line_of(file, path), field=".".join(path), mend=mend
        ) from None


def load(file: str | Path) -> Recipe:
    """Read a recipe from YAML.

    Raises:
        UserError: the file is missing, is not YAML, or does not hold a recipe.
    """
    return parse(read_values(file), file)


def read_values(file: str | Path, what: str = "recipe", mend: str = "write one with `selectune init`") -> dict[str, Any]:
    """Read the raw values of a recipe's (or another) file, unchecked."""
    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no such {what}", file=file, mend=mend) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read ({error})", file=file, expected="a YAML file in UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(
            f"not valid YAML ({getattr(error, 'problem', error)})", file=file, line=mark.line + 1 if mark else None
        ) from None
    if not isinstance(values, dict):
        raise UserError(f"holds no {what}", file=file, expected="keys and values, such as `base: smollm2-135m-instruct`")
    return values


def dump(recipe: Recipe) -> str:
    """Return the recipe as YAML, every key written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def schema() -> str:
    """Return the JSON schema of a recipe, for editors."""
    return json.dumps(Recipe.model_json_schema(), indent=2)


def commented(**given: Any) -> str:
    """Return a recipe with every key, its documentation as comments, and its default (or the value given) beside it."""
    recipe = parse(given)
    lines = ["# A Selectune recipe. Everything may be left out: the values here are the defaults.", ""]
    lines += _comment_section(recipe, 0)
    return "\n".join(lines) + "\n"


def _comment_section(section: Section, depth: int) -> list[str]:
    lines: list[str] = []
    pad = "  " * depth
    for key, info in type(section).model_fields.items():
        value = getattr(section, key)
        described = info.description or (type(value).__doc__ if isinstance(value, Section) else None)
        if depth == 0 and lines:
            lines.append("")
        if described:
            lines.append(f"{pad}# {' '.join(described.replace('``', '`').split())}")
        if isinstance(value, Section):
            lines.append(f"{pad}{key}:")
            lines += _comment_section(value, depth + 1)
        else:
            written = section.model_dump(mode="json")[key]
            lines.append(f"{pad}{key}: {json.dumps(written) if not isinstance(written, str) else _plain(written)}")
    return lines


def _plain(text: str) -> str:
    return yaml.safe_dump(text, width=1000).removesuffix("...\n").strip()


def _refuse_unknown(values: dict[str, Any], model: type[BaseModel], path: tuple[str, ...], file: str | Path | None) -> None:
    for key, value in values.items():
        here = (*path, str(key))
        if key not in model.model_fields:
            raise UserError(
                f"unknown key{nearest(str(key), model.model_fields)}",
                file=file,
                line=line_of(file, here),
                field=".".join(here),
                expected=f"one of {', '.join(model.model_fields)}",
            )
        for place, inner, inside in _sections_of(model.model_fields[key].annotation, value):
            _refuse_unknown(inside, inner, (*here, *place), file)


def _sections_of(annotation: Any, value: Any) -> Iterator[tuple[tuple[str, ...], type[BaseModel], dict[str, Any]]]:
    """Yield the sections in a value, alone or in a list or by name: their place, their model, their values."""
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel) and isinstance(value, dict):
        yield (), annotation, value
    elif origin in (typing.Union, types.UnionType):
        yield from next(filter(None, (list(_sections_of(one, value)) for one in inside)), [])
    elif (origin is list and isinstance(value, list)) or (origin is dict and isinstance(value, dict)):
        for key, item in enumerate(value) if isinstance(value, list) else value.items():
            for place, model, values in _sections_of(inside[-1], item):
                yield (str(key), *place), model, values


def line_of(file: str | Path | None, path: tuple[str, ...]) -> int | None:
    """Find the line of a key in a YAML file; items of a list go by their number."""
    if file is None or not Path(file).is_file():
        return None
    try:
        node = yaml.compose(Path(file).read_text(encoding="utf-8"))
    except yaml.YAMLError:
        return None
    line = None
    for part in path:
        if isinstance(node, yaml.SequenceNode) and part.isdigit() and int(part) < len(node.value):
            node = node.value[int(part)]
            line = node.start_mark.line + 1
            continue
        if not isinstance(node, yaml.MappingNode):
            break
        match = next(((key, value) for key, value in node.value if key.value == part), None)
        if match is None and part.isdigit():  # one value that stands for a list of one
            continue
        if match is None:
            break
        line, node = match[0].start_mark.line + 1, match[1]
    return line
