"""lm-eval's view of the scorer: its tasks run on it unchanged."""

from __future__ import annotations

from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from selectune.evaluation.scorer import Scorer


class ScorerLM(TemplateLM):
    """An lm-eval model on top of :class:`Scorer`."""

    def __init__(self, scorer: Scorer, longest_answer: int = 256) -> None:
        super().__init__()
        self.scorer, self.tokenizer, self._longest_answer = scorer, scorer.tokenizer, longest_answer
        self._questions: list[Any] | None = None  # which item of which task each request belongs to

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        return int(self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.eot_token_id)

    @property
    def max_length(self) -> int:
        return self.scorer.max_length

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(string, **options)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, add_generation_prompt=add_generation_prompt))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        if all(request.doc_id is not None for request in requests):
            self._questions = [(request.task_name, request.doc_id) for request in requests]
        try:
            return super().loglikelihood(requests, disable_tqdm)
        finally:
            self._questions = None

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        lengths = [len(texts[1]) if texts else 0 for texts, _, _ in requests]
        return self.scorer.loglikelihoods(pairs, lengths, self._questions)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        texts = [[self.prefix_token_id, *self.tok_encode(request.args[0])] for request in requests]
        return [-sum(values) for values in self.scorer.token_nll(texts)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        answers: list[str] = [""] * len(requests)
        kinds: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for index, request in enumerate(requests):
            options = request.args[1]
            until = options.get("until") or []
            until = (until,) if isinstance(until, str) else tuple(until)
            limit = min(int(options.get("max_gen_toks", self._longest_answer)), self._longest_answer)
            kinds.setdefault((limit, until), []).append(index)
        for (limit, until), indices in kinds.items():
            prompts = [self.tok_encode(requests[index].args[0]) for index in indices]
            for index, answer in zip(indices, self.scorer.generate(prompts, limit, until), strict=True):
                answers[index] = answer
        return answers
