"""Ask a trained model: `python -m workflow.chat "What is 43 + 2 - 3 + 1?"`, or without a question for a prompt."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from workflow import prompts, stage
from workflow.params import load_params

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODELS = Path("data/models")


def answer(
    question: str,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    system_prompt: str | None,
    temperature: float,
    max_tokens: int,
) -> None:
    """Stream the thoughts and the answer to stdout as they are generated; temperature 0 is greedy."""
    from transformers import TextStreamer

    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages.append({"role": "user", "content": question})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(model.device)
    room = model.config.max_position_embeddings - inputs["input_ids"].shape[1]
    if room < 1:
        raise stage.StageError(f"the question is too long for this model; shorten it by {1 - room} tokens or more")
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = model.generate(**inputs, **sampling, max_new_tokens=min(max_tokens, room), streamer=streamer)
    completion = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    if prompts.parse(completion) is None:
        print("(not in the taught format: the model was not trained for it, or ran out of --max-tokens)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question", nargs="?", help="without it, a prompt that ends with Ctrl-D")
    parser.add_argument("--model", type=Path, help="model folder; by default the last one in params.yaml")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (the default) is greedy")
    parser.add_argument("--max-tokens", type=int, default=512)
    args = parser.parse_args()
    params = load_params()
    folder = args.model or MODELS / params.generate.models[-1]
    if not (folder / "config.json").is_file():
        there = ", ".join(str(path.parent) for path in sorted(MODELS.glob("*/config.json"))) or "none yet"
        raise stage.StageError(f"there is no model in {folder} (models: {there}); train it with: make repro")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    settings = (model, tokenizer, params.system_prompt, args.temperature, args.max_tokens)
    if args.question is not None:
        answer(args.question, *settings)
        return
    print(f"{folder}: ask a question, Ctrl-D ends", file=sys.stderr)
    while True:
        try:
            question = input("> ").strip()
            if question:
                answer(question, *settings)
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except stage.StageError as error:
            print(error)


if __name__ == "__main__":
    stage.run(main)
