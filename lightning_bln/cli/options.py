"""What several subcommands agree on."""

STORAGE_VARIABLE = "OPTUNA_STORAGE"
"""Optuna's own environment variable; the `optuna` command reads it too."""

DEFAULT_STUDY = "lightning-bln"

STORAGE_HELP = (
    "the study's storage: sqlite:///FILE, postgresql://..., mysql://..., grpc://HOST:PORT or a FILE.journal; default: "
    f"{STORAGE_VARIABLE}, else sqlite:///lightning-bln.db"
)
