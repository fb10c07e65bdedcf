"""Reading and writing Hugging Face model folders, dense and low-rank. Safetensors only: no pickle is ever read here."""
