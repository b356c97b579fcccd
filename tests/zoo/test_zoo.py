"""The zoo: every text classifier of transformers and every method of peft is exact, or refused."""

import importlib.metadata
from contextlib import nullcontext
from dataclasses import replace

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from dpnlu.engines import ENGINES
from dpnlu.engines.per_example import PerExample
from tests.zoo import adapters, families, support
from tests.zoo.subjects import Texts
from tests.zoo.verdicts import VERDICTS, dependence, examine

# What models and peft themselves warn of is not what is tested.
pytestmark = pytest.mark.filterwarnings("ignore")

SUBJECTS = {str(subject): subject for subject in (*families.subjects(), *adapters.subjects())}
ROWS = list(dict.fromkeys(subject.row for subject in SUBJECTS.values()))

# Of each kind one, exact or refused.
SOME = [
    "bert, texts", "albert, tokens", "bart, texts", "deberta-v2, tokens", "gpt2, texts",
    "llama, tokens", "longformer, texts", "mixtral, batched_mm, texts",
    "mixtral, grouped_mm, texts", "xlnet, tokens", "LoRA, GPT-2", "DoRA, BERT", "HiRA, GPT-2",
    "Prompt tuning, Llama", "OFT, BERT", "C3A, Llama",
]  # fmt: skip


@pytest.fixture(scope="module")
def document() -> str:
    return support.FILE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SOME)
def test_some_models_are_exact_or_refused_as_the_table_says(document, name):
    subject = SUBJECTS[name]
    found = {outcome.verdict for outcome in examine(subject).values()}
    worst = min(found, key=VERDICTS.index)
    assert worst in ("exact", "refused")
    line = next(line for line in document.splitlines() if line.startswith(f"| {subject.row} |"))
    cells = line.strip("| ").split(" | ")[1:]
    assert cells[support.column_names(subject.row).index(subject.column)] == worst


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_every_model_is_exact_or_refused_as_the_table_says(document, row):
    found = [support.find(subject) for subject in SUBJECTS.values() if subject.row == row]
    assert all(finding.verdict in ("exact", "refused", "not built") for finding in found), found
    assert support.table_row(found) in document.splitlines()
    for finding in found:
        if finding.verdict != "exact":
            assert _is_listed(finding, document), finding


def _is_listed(finding: support.Finding, document: str) -> bool:
    """Whether the name stands below the reason."""
    below = document.partition(f"> {finding.reason}\n\n")[2]
    return finding.name in below.partition("\n")[0].rstrip(".").split("; ")


def test_the_table_has_a_line_for_every_family_and_method(document):
    lines = [line.split(" | ")[0].strip("| ") for line in document.splitlines() if "|" in line]
    assert [line for line in lines if line not in ("family", "method", "---")] == ROWS


@pytest.mark.slow
def test_the_table_was_made_with_the_installed_libraries(document):
    for name in ("transformers", "peft"):
        assert f"{name} {importlib.metadata.version(name)}" in document


def test_every_method_of_peft_is_there():
    """By the types of the adapters in the models that are built."""
    found = set()
    for subject in adapters.subjects():
        if subject.column == "Llama":
            found |= {config.peft_type for config in subject.build().peft_config.values()}
    assert found == set(PEFT_TYPE_TO_CONFIG_MAPPING)


def test_an_error_in_the_seventh_digit_is_found_wrong(monkeypatch):
    """A bound that is a little too large shows in the clipped sum."""

    def careless(model, plan):
        plan = replace(plan, max_grad_norm=plan.max_grad_norm * (1 + 1e-7))
        return nullcontext(PerExample(model, plan))

    monkeypatch.setitem(ENGINES, "careless", careless)
    outcomes = examine(SUBJECTS["bert, texts"], "careless")
    assert {outcome.verdict for outcome in outcomes.values()} == {"wrong"}


@pytest.mark.parametrize(("name", "mixes"), [("LoRA, BERT", False), ("Lily, BERT", True)])
def test_examples_that_depend_on_each_other_are_told(name, mixes):
    """Lily weights its experts by a mean over the batch."""
    change = dependence(SUBJECTS[name], Texts.random(4, 7, is_padded=False), training=False)
    assert (change > 1e-4) == mixes
