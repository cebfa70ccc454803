"""The questions of RLHF: a protocol (`studies/`), its data, and the page that is made of them (`docs/questions/`)."""
