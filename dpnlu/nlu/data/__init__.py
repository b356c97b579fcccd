"""Intent and slot data: one loader per format, one common record, and the vocabulary."""

from dpnlu.nlu.data.assembly import drawn_split as drawn_split
from dpnlu.nlu.data.clinc150 import load_clinc150 as load_clinc150
from dpnlu.nlu.data.errors import DataError as DataError
from dpnlu.nlu.data.hub import load_hub as load_hub
from dpnlu.nlu.data.hwu64 import load_hwu64 as load_hwu64
from dpnlu.nlu.data.jsonl import load_jsonl as load_jsonl
from dpnlu.nlu.data.labels import read_labels as read_labels
from dpnlu.nlu.data.loading import ACCEPTED_SPECS as ACCEPTED_SPECS
from dpnlu.nlu.data.loading import load_corpus as load_corpus
from dpnlu.nlu.data.records import Corpus as Corpus
from dpnlu.nlu.data.records import Example as Example
from dpnlu.nlu.data.records import normalized as normalized
from dpnlu.nlu.data.repeats import RepeatReport as RepeatReport
from dpnlu.nlu.data.repeats import drop_repeated as drop_repeated
from dpnlu.nlu.data.repeats import duplicate_groups as duplicate_groups
from dpnlu.nlu.data.snips import load_snips as load_snips
from dpnlu.nlu.data.synthetic import synthetic_corpus as synthetic_corpus
from dpnlu.nlu.data.table import load_table as load_table
from dpnlu.nlu.data.vocabulary import HashedVocabulary as HashedVocabulary
from dpnlu.nlu.data.vocabulary import Vocabulary as Vocabulary
from dpnlu.nlu.data.vocabulary import WordList as WordList
from dpnlu.nlu.data.vocabulary import fitted_vocabulary as fitted_vocabulary
from dpnlu.nlu.data.vocabulary import read_word_list as read_word_list
from dpnlu.nlu.data.vocabulary import vocabulary_from_dict as vocabulary_from_dict
