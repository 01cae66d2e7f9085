"""Configuration: files, flags and defaults become one tree whose leaves know their origin."""

from ostro.config.aliases import Alias
from ostro.config.choice import Choice
from ostro.config.encode import dump_yaml, encode, public
from ostro.config.fields import field_docs
from ostro.config.files import script_folders
from ostro.config.foreign import Foreign
from ostro.config.help import format_tree, help_text
from ostro.config.imports import import_modules
from ostro.config.loading import Loaded, check, leaves, load
from ostro.config.main import main
from ostro.config.schema import json_schema
