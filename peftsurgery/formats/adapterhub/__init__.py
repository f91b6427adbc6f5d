"""The formats of AdapterHub: the directories of its `adapters` library, read and written."""
