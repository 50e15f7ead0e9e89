"""What an operator does about each fate and each reason. docs/reasons.md is made from it."""

from __future__ import annotations

from collections.abc import Mapping

from moorline.events import Fate, Reason

NOTHING = "Nothing."

FATE_REMEDIES: Mapping[Fate, str] = {
    Fate.PENDING: "Nothing. If it stays so, `moorline status` says what the updater waits for.",
    Fate.TRAINED: NOTHING,
    Fate.REJECTED: "See the reason; `moorline status --json` has the evidence of the last ones.",
    Fate.EXPIRED: "See the reason. Many: raise `learning.horizon_seconds`.",
    Fate.LATE: "Send feedback sooner, or raise `learning.horizon_seconds`.",
    Fate.DUPLICATE: NOTHING,
    Fate.DEAD_LETTERED: "Repair the producer, then `moorline redrive`.",
    Fate.ERASED: NOTHING,
    Fate.RETRACTED: NOTHING,
    Fate.NOT_TRAINABLE: "See the reason.",
}

REMEDIES: Mapping[Reason, str] = {
    Reason.NONE: NOTHING,
    Reason.MALFORMED_JSON: "Repair the producer; `moorline redrive --dry-run` shows the origin.",
    Reason.SCHEMA_MISMATCH: "Repair the producer; `moorline schemas` prints what is allowed.",
    Reason.UNSUPPORTED_SCHEMA_VERSION: "Upgrade the updater, then `moorline redrive`.",
    Reason.EMPTY_VALUE: "Repair the producer; to take a rating back, give the record the key "
    "`<interaction id>/<choice>/<feedback id>`.",
    Reason.TOO_LARGE: "Send less, or raise `stream.max_event_bytes`, then `moorline redrive`.",
    Reason.CORRUPT_RECORD: "Check the brokers' disks and the producer's client library; the dead "
    "letter has the bytes as they came.",
    Reason.UNEXPECTED: "Report it, with the letter's `moorline_error`; after an upgrade that mends "
    "it, `moorline redrive`.",
    Reason.REPEATED_EVENT: NOTHING,
    Reason.SUPERSEDED_RATING: NOTHING,
    Reason.RATING_RETRACTED: NOTHING,
    Reason.RETRACTION: NOTHING,
    Reason.ALREADY_TRAINED: NOTHING,
    Reason.NO_FEEDBACK: NOTHING,
    Reason.NO_INTERACTION: "Check that raters send the `id` of the reply, that the client did not "
    "opt out of recording, and that `moorline_events_dropped_total` is 0; docs/feedback.md, "
    '"Feedback without a reply".',
    Reason.GREEDY_SAMPLING: "Sample at a temperature above 0 where replies shall teach.",
    Reason.ALTERED_SAMPLING: "Leave out penalties, logit bias and structured output where replies "
    "shall teach.",
    Reason.CUSTOM_LOGITS_PROCESSOR: "Serve without it (`--logits-processors` in "
    "`serving.vllm_args`, or an installed vLLM plugin) where replies shall teach.",
    Reason.SPECULATIVE_DECODING: "Leave `--speculative-config` out of `serving.vllm_args` where "
    "replies shall teach.",
    Reason.MULTIMODAL_PROMPT: NOTHING,
    Reason.RAW_LOGPROBS: "Record with Moorline's server, or sample at temperature 1 without "
    "truncation.",
    Reason.NO_LOGPROBS: "Record with Moorline's server; another producer must write one logprob "
    "per token.",
    Reason.INVALID_LOGPROBS: "Repair the producer: logprobs are natural, finite and at most 0.",
    Reason.TOKEN_OUT_OF_VOCABULARY: "Give server and updater the same `model.path`.",
    Reason.EMPTY_PROMPT: NOTHING,
    Reason.EMPTY_COMPLETION: NOTHING,
    Reason.LENGTH_MISMATCH: "Repair the producer: one logprob a token, and spans over all tokens.",
    Reason.TOO_LONG: "Raise `learning.max_example_tokens`, where memory allows.",
    Reason.ABORTED: NOTHING,
    Reason.UNKNOWN_SIGNAL: "Give the signal a reward in `learning.signals`, or stop sending it.",
    Reason.OVERRIDDEN_SIGNAL: NOTHING,
    Reason.PROMPTS_DIFFER: "Compare replies to the same prompt; token ids must be equal.",
    Reason.OFF_POLICY: "Rate sooner, or raise `learning.max_off_policy_kl_nats`.",
    Reason.UNKNOWN_POLICY: "Check `alias`, and that the server reads this updater's store.",
    Reason.MISMATCH: "Compare the model, its precision and the software of server and updater; in "
    "bfloat16 raise `learning.mismatch_limit_nats` a little.",
    Reason.NO_ADVANTAGE: "Nothing. If always: all replies are rated alike, so ask for ratings that "
    "tell them apart.",
    Reason.DIVERGENCE_BOUND: "Lower `learning.learning_rate`.",
    Reason.GATE_BLOCKED: "Read the failed check in the rejection; do not raise its limit before "
    "you know why it failed.",
    Reason.NON_FINITE_UPDATE: "Lower `learning.learning_rate`; if it stays, report it.",
    Reason.MAY_HAVE_TAUGHT: "Nothing: the ledger was lost or older than the store. "
    "`moorline backup` keeps both at one version.",
    Reason.RELEASE_REVOKED: "Nothing. `learning.keep_decided_seconds` says how much is kept to "
    "learn from again.",
    Reason.UPDATE_FAILED: "Report it, with the ERROR line and the rejection; they hold no words.",
    Reason.UPDATE_CRASHED: 'See docs/operations.md, "An update kills the updater".',
}
