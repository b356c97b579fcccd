"""Examples at the end of every command's help."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

# Command -> (what it does, the command line).
EXAMPLES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "compare": (
        (
            "A first study, on a synthetic corpus and without reference models:",
            "dpnlu compare --data synthetic:2000 --epochs 5 --references 0 --out study",
        ),
        (
            "SNIPS without privacy and at two budgets, with a secret of four digits in 100 copies:",
            "dpnlu compare --data snips:SNIPS --epsilons inf 8 2 --references 4 "
            "--canaries pin:4:R=100 --out study",
        ),
        (
            "A pretrained encoder, attacked without reference models:",
            "dpnlu compare --data utterances.jsonl --model encoder:MODEL --epsilons inf 8 "
            "--references 0 --attacks loss audit --out study",
        ),
    ),
    "train": (
        (
            "A BiLSTM with ε = 8, and the same after an interruption:",
            "dpnlu train --data utterances.jsonl --epsilon 8 --out model\n"
            "dpnlu train --data utterances.jsonl --epsilon 8 --out model --resume",
        ),
        (
            "Heads on a pretrained encoder; label sets that are declared, not read from the data:",
            "dpnlu train --data utterances.jsonl --model encoder:MODEL --epsilon 2 "
            "--labels labels.json --out model",
        ),
        (
            "Protect people, named in the data, with all of their texts:",
            "dpnlu train --data utterances.jsonl --unit user --examples-per-user 8 --epsilon 8 "
            "--delta 1e-4 --out model",
        ),
        (
            "The best of some five trainings, whose price is in the ε:",
            "dpnlu train --data utterances.jsonl --epsilon 8 --trials 5 "
            "--search learning_rate=0.01,0.02 --out model",
        ),
        (
            "Without privacy, for comparison:",
            "dpnlu train --data utterances.jsonl --epsilon inf --out ordinary",
        ),
    ),
    "recipe": (
        (
            "How would a private BiLSTM be trained on these texts, and with how much noise?",
            "dpnlu recipe --data utterances.jsonl --epsilon 8",
        ),
        (
            "The same for heads on an encoder, where every user is protected:",
            "dpnlu recipe --data utterances.jsonl --model encoder:MODEL --epsilon 2 --unit user",
        ),
    ),
    "diagnose": (
        (
            "Why is a BiLSTM at ε = 8 worse than an ordinary one? On a public corpus:",
            "dpnlu diagnose --data snips:SNIPS --epsilon 8 --public",
        ),
        (
            "The same for heads on an encoder, with as many epochs as would be taken:",
            "dpnlu diagnose --data snips:SNIPS --model encoder:MODEL --epsilon 2 --epochs 20 "
            "--public",
        ),
    ),
    "predict": (
        (
            "One text a line in, one JSON object a line out:",
            "dpnlu predict model utterances.txt",
        ),
        (
            "JSON objects with text or tokens, computed by the processor:",
            "dpnlu predict model new.jsonl --device cpu",
        ),
    ),
    "attack": (
        (
            "With eight reference models, trained like the model on random halves:",
            "dpnlu attack model --data utterances.jsonl --out report",
        ),
        (
            "In a minute, without any:",
            "dpnlu attack model --data utterances.jsonl --references 0 --attacks loss --out report",
        ),
        (
            "What the model completes a phrase with, by its directory alone:",
            'dpnlu attack model --attacks extraction --prefix "my pin code is" --length 4 '
            "--out report",
        ),
    ),
    "budget": (
        (
            "The noise that ε = 8 needs:",
            "dpnlu budget --num-examples 13084 --batch-size 512 --epochs 20 --epsilon 8",
        ),
        (
            "The ε of a noise, by another accountant:",
            "dpnlu budget --num-examples 13084 --batch-size 512 --epochs 20 --noise-multiplier 1.1 "
            "--accountant prv",
        ),
        (
            "Noise that falls by 3 % with every epoch, as JSON:",
            "dpnlu budget --num-examples 13084 --batch-size 512 --epochs 20 --epsilon 8 "
            "--noise-schedule exponential:0.97 --json",
        ),
    ),
    "benchmark": (
        (
            "What a private step takes, of ordinary ones, on two threads:",
            "dpnlu benchmark overhead --threads 2",
        ),
        (
            "The memory of the cases with MiniLM, kept as dated files:",
            "dpnlu benchmark memory --cases MiniLM --out results",
        ),
    ),
}


def add_examples(commands: Mapping[str, argparse.ArgumentParser]) -> None:
    """End the help of every command that has examples with them."""
    for name, parser in commands.items():
        if name in EXAMPLES:
            parser.epilog = _shown(EXAMPLES[name])
            # The other formatters would fill the lines of the examples.
            parser.formatter_class = argparse.RawDescriptionHelpFormatter


def _shown(examples: tuple[tuple[str, str], ...]) -> str:
    parts = ["examples:"]
    for purpose, lines in examples:
        indented = "\n".join(f"    {line}" for line in lines.splitlines())
        parts.append(f"  {purpose}\n{indented}")
    return "\n\n".join(parts)
