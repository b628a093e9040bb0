"""The row that tests of comparisons and tables vary."""

BASE = {
    "task": "needle",
    "model": "toy",
    "policy": "keydiff",
    "budget": "512",
    "status": "ok",
    "score": 1.0,
    "kv_bytes_kept": 2_000_000,
    "kv_bytes_peak": 3_000_000,
    "ttft_sec": 0.5,
    "decode_tokens_per_sec": 40.0,
    "slots": 4,
    "seed": 0,
    "run_id": "run",
}
