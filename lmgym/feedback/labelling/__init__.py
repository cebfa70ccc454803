"""What the labelling page is made of: items, plans, answers, and the files of the page itself."""
