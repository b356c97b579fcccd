"""Intent and slot data: one loader per format, one common record, and the vocabulary."""

from dpnlu.data.assembly import drawn_split as drawn_split
from dpnlu.data.clinc150 import load_clinc150 as load_clinc150
from dpnlu.data.errors import DataError as DataError
from dpnlu.data.hub import load_hub as load_hub
from dpnlu.data.hwu64 import load_hwu64 as load_hwu64
from dpnlu.data.jsonl import load_jsonl as load_jsonl
from dpnlu.data.labels import read_labels as read_labels
from dpnlu.data.loading import ACCEPTED_SPECS as ACCEPTED_SPECS
from dpnlu.data.loading import load_corpus as load_corpus
from dpnlu.data.records import Corpus as Corpus
from dpnlu.data.records import Example as Example
from dpnlu.data.records import normalized as normalized
from dpnlu.data.repeats import RepeatReport as RepeatReport
from dpnlu.data.repeats import drop_repeated as drop_repeated
from dpnlu.data.repeats import duplicate_groups as duplicate_groups
from dpnlu.data.snips import load_snips as load_snips
from dpnlu.data.synthetic import synthetic_corpus as synthetic_corpus
from dpnlu.data.table import load_table as load_table
from dpnlu.data.vocabulary import HashedVocabulary as HashedVocabulary
from dpnlu.data.vocabulary import Vocabulary as Vocabulary
from dpnlu.data.vocabulary import WordList as WordList
from dpnlu.data.vocabulary import fitted_vocabulary as fitted_vocabulary
from dpnlu.data.vocabulary import read_word_list as read_word_list
from dpnlu.data.vocabulary import vocabulary_from_dict as vocabulary_from_dict
