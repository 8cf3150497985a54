"""Turns what an environment shows into token ids.

Read `inline` (the protocol, and running text), `chat` (messages of a chat, by templates that keep every
message), `chat_templates` (the templates), `window` (a prompt of its own for each turn), `tokenizer` (Hugging
Face tokenizers behind the `Tokenizer` protocol).
"""
