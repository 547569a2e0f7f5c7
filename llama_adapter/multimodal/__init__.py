"""Images, or features of anything else, as a part of the prompts."""
