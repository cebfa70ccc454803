"""The questions of RLHF: a file each with its protocol, and a template with the text around its numbers."""
