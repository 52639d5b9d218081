"""The algebra of adapters: sites, edits, adapters and files.  It knows no method and no task."""
