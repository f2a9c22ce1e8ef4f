from pointsman.scripts.simulated_engine.context import JsonObject
from pointsman.scripts.simulated_engine.driver import Ticket


def count_usage(ticket: Ticket, choices: int = 1) -> tuple[int, int, int]:
    """(prompt, cached, completion) tokens; a prompt with several choices counts once."""
    first_choices = [output.sequence for output in ticket.outputs[::choices]]
    prompt = sum(sequence.request.prompt_tokens for sequence in first_choices)
    cached = sum(sequence.cached_tokens for sequence in first_choices)
    completion = sum(output.sequence.generated_tokens for output in ticket.outputs)
    return prompt, cached, completion


def describe_usage(ticket: Ticket, choices: int = 1) -> JsonObject:
    """OpenAI's `usage` as vLLM gives it with --enable-prompt-tokens-details."""
    prompt, cached, completion = count_usage(ticket, choices)
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
