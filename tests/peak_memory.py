"""Run as a script: peak resident memory of one generation over the loaded model, in bytes, as JSON.

The arguments name a policy, a codec and, if it is not the even one, a budget shape. A process of
its own for each, so that no earlier allocation can hide a later one. Linux only.
"""

import gc
import json
import sys

from kvarena.harness.engine import Engine, Generation
from kvarena.harness.engine.free_memory import give_back_free_memory
from kvarena.harness.models import load_model
from kvarena.harness.registry import build, load_choice
from kvarena.tasks.needle import Needle


def resident_bytes(field: str) -> int:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    model, tokenizer = load_model("smollm2-135m")
    (sample,) = Needle(lengths=[4000], depths=[50]).samples(tokenizer, seed=0)
    engine = Engine(
        model,
        build(load_choice("policy", sys.argv[1])),
        codec=build(load_choice("codec", sys.argv[2])),
        shape=build(load_choice("shape", (*sys.argv, "uniform")[3])),
        budget_tokens=512,
        chunk_tokens=128,
        slots=1,
    )
    # A short run maps the weights and the libraries' code; then everything that it and loading left
    # free goes back to the system, so that no free memory can hide what the long run takes.
    next(engine.generate([sample.prompt_token_ids[:64]], max_new_tokens=2))
    gc.collect()
    give_back_free_memory()
    with open("/proc/self/clear_refs", "w") as control:
        control.write("5")  # the peak starts from here
    before = resident_bytes("VmRSS")
    batch = engine.batch([sample.prompt_token_ids], max_new_tokens=70)
    finished: list[Generation] = []
    while not finished:
        finished = batch.step()
    (generation,) = finished
    print(
        json.dumps(
            {
                "over_model_bytes": resident_bytes("VmHWM") - before,
                # What stays between passes: nothing of a layer's workspace.
                "held_bytes": resident_bytes("VmRSS") - before,
                "kv_bytes_kept": generation.kv_bytes_kept,
                "kv_bytes_peak": generation.kv_bytes_peak,
                "prompt_tokens": generation.prompt_tokens,
                "capacities": sorted(
                    {layer.keys.shape[2] for layer in batch.layers if hasattr(layer, "keys")}
                ),
            }
        )
    )


if __name__ == "__main__":
    main()
