"""What an environment shows, as token ids.

Read `transcripts` (inline text, or messages of a chat), `chat_templates` and `chat_rendering`
(templates that keep every message), `tokenizer` (Hugging Face tokenizers behind the `Tokenizer`
protocol).
"""
