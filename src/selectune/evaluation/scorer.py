"""Scores texts under a model, fast, with the decisions of the slow way.

Knows: log-likelihoods of continuations, greedy answers, and losses of texts. The continuations of one context (the choices of
one question) stand in one row behind a single copy of the context, each blind to the others; only continuation positions
meet the vocabulary; rows are sorted by length and batched by tokens. Log-likelihoods are computed in bf16 where that is
fast, and every question whose choices lie closer together than the measured rounding noise is scored again in fp32, so
that decisions are those of fp32 at batch size 1. Greedy answers are generated in fp32.
Does not know: what a benchmark is.
"""

from __future__ import annotations

import copy
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from selectune.models.head import SplitModel
from selectune.training.allocator import keep_freed_memory

Pair = tuple[Sequence[int], Sequence[int]]
NOISE_MARGIN = 4.0
"""A gap is a near-tie when it is smaller than this many times the largest rounding error per token seen while probing."""


class Scorer:
    """Scores token sequences.

    Args:
        model: a causal model or a PEFT model around one. tokenizer: its tokenizer.
        bfloat16: score in bf16 first. batch_tokens: tokens, padding included, in one forward pass.
    """

    def __init__(
        self, model: Any, tokenizer: Any, bfloat16: bool = False, batch_tokens: int = 4096, progress: bool = False
    ) -> None:
        keep_freed_memory()
        self.model, self.tokenizer = model.eval(), tokenizer
        self._bfloat16, self._batch_tokens, self._progress = bfloat16, batch_tokens, progress
        self._split = SplitModel(model)
        self._exact: SplitModel | None = None
        config = self._split.causal.config.get_text_config()
        self.max_length = min(getattr(config, "max_position_embeddings", None) or 2048, 8192)
        window = getattr(config, "sliding_window", None)
        self._longest_row = min(self.max_length * 4, window or 1 << 30, 2048)
        self._learned_positions = hasattr(config, "n_positions") or config.model_type in ("gpt2", "opt")

    # -- log-likelihoods ---------------------------------------------------------------------------------------------

    def loglikelihoods(self, pairs: Sequence[Pair], lengths: Sequence[int] | None = None) -> list[tuple[float, bool]]:
        """Return, for each pair of context and continuation tokens, ``(sum of log-probabilities, is it the greedy one)``.

        Args:
            pairs: contexts must not be empty. lengths: of the continuations' texts, for questions that are decided by
                length-normalised scores; near-ties are looked for under them too.
        """
        if any(not context or not continuation for context, continuation in pairs):
            raise ValueError("a context or a continuation is empty")
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        cut = [self._cut(pair) for pair in pairs]
        for index, (context, _) in enumerate(cut):
            groups[tuple(context)].append(index)
        rows = list(self._rows(groups, cut))
        found: list[tuple[float, bool, float]] = [(0.0, False, 0.0)] * len(pairs)
        fast = self._bfloat16
        for indices, scores in self._score_rows(self._split, rows, cut, fast, "scoring"):
            for index, score in zip(indices, scores, strict=True):
                found[index] = score
        if fast:
            noise = self._noise(rows, cut, found)
            again = [row for row in rows if self._doubtful(row[1], cut, found, noise, lengths)]
            for indices, scores in self._score_rows(self._in_fp32(), again, cut, False, "deciding near-ties in fp32"):
                for index, score in zip(indices, scores, strict=True):
                    found[index] = score
        return [(total, greedy) for total, greedy, _ in found]

    def _cut(self, pair: Pair) -> tuple[list[int], list[int]]:
        """Cut a context from the left so that it fits."""
        context, continuation = list(pair[0]), list(pair[1])
        room = self.max_length + 1 - len(continuation)
        return (context[-room:] if room > 0 else context[-1:]), continuation

    def _rows(
        self, groups: dict[tuple[int, ...], list[int]], cut: list[tuple[list[int], list[int]]]
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Yield ``(context, indices of its continuations)``, split where a row would become too long."""
        for context, indices in groups.items():
            part: list[int] = []
            used = len(context)
            for index in indices:
                need = len(cut[index][1]) - 1
                if part and used + need > max(self._longest_row, len(context) + need):
                    yield list(context), part
                    part, used = [], len(context)
                part.append(index)
                used += need
            yield list(context), part

    def _score_rows(
        self, split: SplitModel, rows: list[tuple[list[int], list[int]]], cut: Any, fast: bool, what: str
    ) -> Iterator[tuple[list[int], list[tuple[float, bool, float]]]]:
        def width(row: tuple[list[int], list[int]]) -> int:
            return len(row[0]) + sum(len(cut[index][1]) - 1 for index in row[1])

        ordered = sorted(rows, key=width, reverse=True)
        for batch in self._watched(list(_batches(ordered, width, self._batch_tokens)), what):
            inputs, places, targets, owners = self._lay_out(batch, cut)
            with torch.no_grad(), torch.autocast("cpu" if inputs["input_ids"].device.type == "cpu" else "cuda",
                                                 torch.bfloat16, enabled=fast):  # fmt: skip
                hidden = split.hidden(**inputs)
                picked = hidden.reshape(-1, hidden.shape[-1])[places]
                log_probabilities, greedy, margins = self._through_head(split, picked, targets)
            sums: dict[int, list[Any]] = {index: [0.0, True, float("inf")] for _, indices in batch for index in indices}
            for owner, value, best, margin in zip(
                owners, log_probabilities.tolist(), greedy.tolist(), margins.tolist(), strict=True
            ):
                sums[owner][0] += value
                sums[owner][1] &= best
                sums[owner][2] = min(sums[owner][2], margin)
            yield list(sums), [(total, best, margin) for total, best, margin in sums.values()]

    def _lay_out(self, batch: list[tuple[list[int], list[int]]], cut: Any) -> tuple[dict[str, Tensor], Tensor, Tensor, list[int]]:
        """Lay rows side by side: context, then every continuation, each with positions that go on from the context."""
        width = max(len(context) + sum(len(cut[i][1]) - 1 for i in indices) for context, indices in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        positions = torch.zeros_like(ids)
        group = torch.full_like(ids, -1)  # 0: context, 1..: continuations, -1: padding
        places, targets, owners = [], [], []
        for row, (context, indices) in enumerate(batch):
            length = len(context)
            ids[row, :length] = torch.tensor(context)
            positions[row, :length] = torch.arange(length)
            group[row, :length] = 0
            end = length
            for number, index in enumerate(indices, 1):
                continuation = cut[index][1]
                shown = len(continuation) - 1  # the last token is predicted, never read
                if shown:
                    ids[row, end : end + shown] = torch.tensor(continuation[:-1])
                    positions[row, end : end + shown] = torch.arange(length, length + shown)
                    group[row, end : end + shown] = number
                places += [row * width + length - 1, *range(row * width + end, row * width + end + shown)]
                targets += continuation
                owners += [index] * len(continuation)
                end += shown
        inputs = {"input_ids": ids, "position_ids": positions}
        if any(len(indices) > 1 for _, indices in batch):
            order = torch.arange(width)
            causal = order[None, :] <= order[:, None]
            seen = (group[:, None, :] == group[:, :, None]) | (group[:, None, :] == 0)
            mask = (causal[None] & seen) | torch.eye(width, dtype=torch.bool)[None]
            inputs["attention_mask"] = self._mask(mask)
        device = next(self.model.parameters()).device
        inputs = {key: _to(value, device) for key, value in inputs.items()}
        return inputs, torch.tensor(places, device=device), torch.tensor(targets, device=device), owners

    def _mask(self, mask: Tensor) -> Any:
        """Give the mask in the form that the decoder takes as it is: ``(batch, 1, query, key)``, for every kind of layer."""
        kinds = set(getattr(self._split.causal.config.get_text_config(), "layer_types", None) or [])
        four = mask[:, None]
        if self._split.causal.config.get_text_config()._attn_implementation == "eager":
            four = torch.zeros(four.shape).masked_fill(~four, torch.finfo(torch.float32).min)
        return {kind: four for kind in kinds} if len(kinds) > 1 else four

    def _through_head(self, split: SplitModel, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the log-probability of each target, whether it is the greedy token, and by how much that is clear."""
        values, greedy, margins = [], [], []
        for states, wanted in zip(hidden.split(1024), targets.split(1024), strict=True):
            logits = split.logits(states).float()
            chosen = logits.gather(-1, wanted[:, None]).squeeze(-1)
            values.append(chosen - logits.logsumexp(-1))
            two = logits.topk(2, -1)
            greedy.append(two.indices[:, 0] == wanted)
            margins.append((two.values[:, 0] - torch.where(greedy[-1], two.values[:, 1], chosen)).abs())
        return torch.cat(values), torch.cat(greedy), torch.cat(margins)

    def _noise(self, rows: Any, cut: Any, found: list[tuple[float, bool, float]]) -> float:
        """Measure the largest rounding error per token of the fast way, on a few rows spread over all lengths."""
        ordered = sorted(rows, key=lambda row: len(row[0]))
        probes = ordered[:: max(1, len(ordered) // 8)][:8]
        worst = 1e-3
        for indices, scores in self._score_rows(self._in_fp32(), probes, cut, False, ""):
            for index, (total, _, _) in zip(indices, scores, strict=True):
                worst = max(worst, abs(total - found[index][0]) / len(cut[index][1]) ** 0.5)
        return worst

    def _doubtful(self, indices: list[int], cut: Any, found: Any, noise: float, lengths: Sequence[int] | None) -> bool:
        """Whether rounding could change a decision: which choice is best, by sum or per length, or what is greedy."""
        error = {index: NOISE_MARGIN * noise * len(cut[index][1]) ** 0.5 for index in indices}
        if len(indices) == 1:  # decided by whether the continuation is the greedy one
            _, greedy, margin = found[indices[0]]
            return bool(margin < NOISE_MARGIN * noise * 2 and (greedy or len(cut[indices[0]][1]) < 8))
        scales = [{index: 1.0 for index in indices}]
        if lengths is not None:
            scales.append({index: float(max(lengths[index], 1)) for index in indices})
        for scale in scales:
            ranked = sorted(indices, key=lambda index: -found[index][0] / scale[index])
            best = ranked[0]
            for other in ranked[1:]:
                gap = found[best][0] / scale[best] - found[other][0] / scale[other]
                if gap < error[best] / scale[best] + error[other] / scale[other]:
                    return True
        return False

    def _in_fp32(self) -> SplitModel:
        """Return the model in fp32, made when it is first needed."""
        if self._exact is None:
            if any(getattr(value, "quant_state", None) is not None for value in self.model.parameters()):
                exact = self.model  # 4-bit weights are expanded to the dtype of what meets them
            elif all(value.dtype == torch.float32 for value in self.model.parameters()):
                exact = self.model
            else:
                exact = copy.deepcopy(self.model).float()
            self._exact = SplitModel(exact)
        return self._exact

    # -- losses of texts ---------------------------------------------------------------------------------------------

    def token_nll(self, texts: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the negative log-likelihood, in nats, of every token but the first of each text."""
        order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
        result: list[list[float]] = [[] for _ in texts]
        batches = list(_batches(order, lambda index: len(texts[index]), self._batch_tokens))
        for batch in self._watched(batches, "reading"):
            for index, values in zip(batch, self._nll_of([texts[index] for index in batch]), strict=True):
                result[index] = values
        return result

    def _nll_of(self, texts: list[Sequence[int]]) -> list[list[float]]:
        pairs: Any = {index: ([text[0]], list(text[1:])) for index, text in enumerate(texts)}
        inputs, places, targets, owners = self._lay_out([(pairs[i][0], [i]) for i in pairs], pairs)
        with torch.no_grad(), torch.autocast(inputs["input_ids"].device.type, torch.bfloat16, enabled=self._bfloat16):
            hidden = self._split.hidden(**inputs)
            values, _, _ = self._through_head(self._split, hidden.reshape(-1, hidden.shape[-1])[places], targets)
        result: list[list[float]] = [[] for _ in texts]
        for owner, value in zip(owners, values.tolist(), strict=True):
            result[owner].append(-value)
        return result

    # -- greedy answers ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[str] = (), batch_size: int = 16
    ) -> list[str]:
        """Return the greedy continuation of each prompt, up to the end of the turn, a stop string, or the limit.

        The beginning that all prompts share (few-shot examples, a system message) is computed once.
        """
        if not prompts:
            return []
        causal = self._in_fp32().causal
        prompts = [list(prompt)[-(self.max_length - max_new_tokens) :] for prompt in prompts]
        shared = _shared_prefix(prompts) if len(prompts) > 1 else 0
        prefix = None
        if shared >= 16:
            prefix = causal(input_ids=torch.tensor([prompts[0][:shared]]), use_cache=True).past_key_values
        else:
            shared = 0
        answers = [""] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        for batch in self._watched(batches, "answering"):
            texts = self._answer(causal, [prompts[i][shared:] for i in batch], prefix, shared, max_new_tokens, stop)
            for index, text in zip(batch, texts, strict=True):
                answers[index] = text
        return answers

    def _answer(
        self, causal: Any, rests: list[list[int]], prefix: Any, shared: int, limit: int, stop: Sequence[str]
    ) -> list[str]:
        count, width = len(rests), max(map(len, rests))
        ids = torch.zeros(count, width, dtype=torch.int64)
        real = torch.zeros(count, shared + width, dtype=torch.int64)
        real[:, :shared] = 1
        for row, rest in enumerate(rests):
            ids[row, width - len(rest) :] = torch.tensor(rest)
            real[row, shared + width - len(rest) :] = 1
        cache = copy.deepcopy(prefix)
        if cache is not None:
            cache.batch_repeat_interleave(count)
        ends = set(_as_list(self.tokenizer.eos_token_id)) | set(_as_list(causal.generation_config.eos_token_id))
        produced: list[list[int]] = [[] for _ in rests]
        going = list(range(count))  # the answer that each row of the batch writes
        positions = (real.cumsum(-1) - 1).clamp(min=0)[:, shared:]
        for _ in range(limit):
            out = causal(input_ids=ids, attention_mask=real, position_ids=positions, past_key_values=cache, use_cache=True,
                         logits_to_keep=1)  # fmt: skip
            cache, tokens = out.past_key_values, out.logits[:, -1].argmax(-1)
            open_rows = []
            for row, (answer, token) in enumerate(zip(going, tokens.tolist(), strict=True)):
                if token in ends:
                    continue
                produced[answer].append(token)
                if not (stop and any(mark in self.tokenizer.decode(produced[answer][-24:]) for mark in stop)):
                    open_rows.append(row)
            if not open_rows:
                break
            ids, positions = tokens[:, None], positions[:, -1:] + 1
            real = torch.cat([real, torch.ones(len(going), 1, dtype=torch.int64)], -1)
            if len(open_rows) < len(going):  # finished answers leave the batch
                kept = torch.tensor(open_rows)
                cache.batch_select_indices(kept)
                ids, positions, real = ids[kept], positions[kept], real[kept]
                going = [going[row] for row in open_rows]
        texts = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in produced]
        return [_until(text, stop) for text in texts]

    def _watched(self, batches: list[Any], what: str) -> Iterable[Any]:
        if not self._progress or not what or len(batches) < 3:
            yield from batches
            return
        with Progress(console=Console(file=sys.__stderr__), transient=True) as progress:
            yield from progress.track(batches, description=what)


def _batches(items: Sequence[Any], width: Callable[[Any], int], tokens: int) -> Iterator[list[Any]]:
    """Yield runs of items (sorted by falling width) whose padded size stays within ``tokens``."""
    batch: list[Any] = []
    for item in items:
        if batch and (len(batch) + 1) * width(batch[0]) > tokens:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _to(value: Any, device: torch.device) -> Any:
    return {key: item.to(device) for key, item in value.items()} if isinstance(value, dict) else value.to(device)


def _shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    first, last = min(map(list, prompts)), max(map(list, prompts))
    limit = min(map(len, prompts)) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)


def _until(text: str, stop: Sequence[str]) -> str:
    for mark in stop:
        text = text.split(mark)[0] if mark else text
    return text


def _as_list(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
