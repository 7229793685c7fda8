"""What a tokenizer's special tokens are for (bos, eos, pad, ...), as Hugging Face's files beside it say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llmc.formats.json_files import read_object, write_json

EOT = "<|endoftext|>"
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
ROLES_FILE = "special_tokens_map.json"


def read_roles(folder: Path, special: Mapping[str, int]) -> dict[str, int]:
    """Read which special token has which role.

    Args:
        folder: the tokenizer's folder. Of special_tokens_map.json, tokenizer_config.json and config.json the first that knows a role
            counts.
        special: the ids of the tokenizer's special tokens. A role of another token is none: transformers writes GPT-2's ids into the
            config.json of any vocabulary.

    Returns:
        The id for each role. That <|endoftext|> is bos, eos and unk, as GPT-2 has it, is left out.

    Raises:
        llmc.Error: if a file is damaged.
    """
    texts = {i: text for text, i in special.items()}
    roles: dict[str, int] = {}
    for name in ("config.json", "tokenizer_config.json", ROLES_FILE):  # a later one replaces what an earlier one said
        fields = read_object(folder / name, missing_ok=True)
        for role in ROLES:
            value = fields.get(f"{role}_token")
            text = value.get("content") if isinstance(value, dict) else value
            if name == "config.json":
                number = fields.get(f"{role}_token_id")
                text = texts.get(number) if isinstance(number, int) else None
            if isinstance(text, str) and text in special:
                roles[role] = special[text]
    return {k: i for k, i in roles.items() if texts[i] != EOT or k not in ("bos", "eos", "unk")}


def write_roles(folder: Path, roles: Mapping[str, str]) -> None:
    """Write special_tokens_map.json, unless there are no roles, or the folder's files say the same.

    Args:
        folder: the tokenizer's folder.
        roles: the token of each role.
    """
    special = {text: i for i, text in enumerate(sorted(set(roles.values())))}
    if read_roles(folder, special) != {role: special[text] for role, text in roles.items()}:
        write_json(folder / ROLES_FILE, {f"{role}_token": token for role, token in roles.items()})
