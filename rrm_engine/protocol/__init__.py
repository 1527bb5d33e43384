"""What a node may write and how it is told so: events and their parser, grammar, prompt styles, chat format."""
