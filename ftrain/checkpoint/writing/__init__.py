"""From a state to packs on storage."""
