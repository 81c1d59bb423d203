"""The layer beside its peers: writes layer.json, which the benchmarks page shows. `make bench` runs it.

Times are ratios to `keras.layers.MultiHeadAttention`, taken call by call in turn in one process; a ratio is the median
of the paired ratios. Peak memory is that of a process of its own, above what it held before. The layer that PyPI offers
under our name (0.1.1) and that of pytorch-forecasting live in a folder of their own, `.venv/peers`.
"""

import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
LENGTHS = {32: 64, 512: 8, 2048: 2}  # tokens: samples in a batch
HEADS, SIZE = 8, 8
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}  # see capture.py


def layer(who, dropout):
    """A function from `x` to the self-attention of `x`."""
    import keras

    if who in ("ours", "original"):  # `original` differs by the path it is imported from
        from kerasfactory.layers import InterpretableMultiHeadAttention

        attention = InterpretableMultiHeadAttention(SIZE, HEADS, dropout)
        return lambda x: attention(x, x, x)
    if who == "torch":
        import torch

        attention = torch.nn.MultiheadAttention(HEADS * SIZE, HEADS, dropout, batch_first=True).eval()
        return lambda x: attention(x, x, x, need_weights=True, average_attn_weights=False)[0]
    if who == "pytorch-forecasting":
        from pytorch_forecasting.models.temporal_fusion_transformer.sub_modules import InterpretableMultiHeadAttention

        attention = InterpretableMultiHeadAttention(HEADS, HEADS * SIZE, dropout).eval()
        return lambda x: attention(x, x, x)[0]
    attention = keras.layers.MultiHeadAttention(HEADS, SIZE, dropout=dropout)
    if who == "with scores":
        return lambda x: attention(x, x, return_attention_scores=True)[0]
    return lambda x: attention(x, x)


def model(who, length, dropout):
    """Nothing but attention, so that nothing else dilutes the ratio."""
    import keras

    inputs = keras.Input((length, HEADS * SIZE))
    built = keras.Model(inputs, layer(who, dropout)(inputs))
    built.compile("sgd", "mse")
    return built


def data(length):
    import numpy as np

    return np.random.default_rng(0).normal(size=(LENGTHS.get(length, 1), length, HEADS * SIZE)).astype("float32")


def seconds(call, *arguments):
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def ratios(calls, arguments, length):
    """Of each call to the one named `plain`: median and quartiles, and the milliseconds of the call."""
    import numpy as np

    rounds = max(9, min(31, 6_000 // length))
    times = {name: np.array([]) for name in calls}
    for _ in range(rounds + 2):
        for name, call in calls.items():
            times[name] = np.append(times[name], seconds(call, *arguments))
    result = {}
    for name, taken in times.items():
        low, middle, high = np.quantile(taken[2:] / times["plain"][2:], [0.25, 0.5, 0.75])
        result[name] = {
            "ratio": round(float(middle), 2),
            "quartiles": [round(float(low), 2), round(float(high), 2)],
            "milliseconds": round(1e3 * float(np.median(taken[2:])), 1),
        }
    del result["plain"]["ratio"], result["plain"]["quartiles"]
    return result


def speed(length, dropout, *names):
    """Training steps and predictions of each."""
    x = data(length)
    models = {name: model(name, length, dropout) for name in (*names, "plain")}
    return {
        "train": ratios({name: one.train_on_batch for name, one in models.items()}, (x, x), length),
        "predict": ratios({name: one.predict_on_batch for name, one in models.items()}, (x,), length),
    }


def torch_speed(length, dropout, *names):
    """Forward passes of layers that are not Keras', without gradients."""
    import torch

    x = torch.from_numpy(data(length))
    with torch.no_grad():
        return {"predict": ratios({name: layer(name, dropout) for name in (*names, "plain")}, (x,), length)}


def memory(what, who, length, dropout):
    """MiB above what the process held before (on Linux)."""
    one = model(who, 32, dropout)  # what libraries need once
    getattr(one, what)(*[data(32)] * (1 + (what == "train_on_batch")))
    one, x = model(who, length, dropout), data(length)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    getattr(one, what)(*[x] * (1 + (what == "train_on_batch")))
    return round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 2**20)


def eager_capture(samples):
    """Scores of all samples, as the original layer gives them: eagerly, batch by batch."""
    import keras
    import numpy as np

    inputs = keras.Input((32, HEADS * SIZE))
    x = np.random.default_rng(0).normal(size=(samples, 32, HEADS * SIZE)).astype("float32")
    if "ours" in sys.argv:
        from kerasfactory import explain

        one = keras.Model(inputs, layer("ours", 0.1)(inputs))
        call = lambda x: next(iter(explain.capture(one, x, batch_size=256, verbose=0).values())).values  # noqa: E731
    else:
        from kerasfactory.layers import InterpretableMultiHeadAttention

        attention = InterpretableMultiHeadAttention(SIZE, HEADS, 0.1)

        def call(x):
            batches = []
            for start in range(0, len(x), 256):
                batch = keras.ops.convert_to_tensor(x[start : start + 256])
                attention(batch, batch, batch)
                batches.append(keras.ops.convert_to_numpy(attention.attention_scores))
            return np.concatenate(batches)

    call(x[:300])
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    result = call(x).nbytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {
        "seconds": min(seconds(call, x) for _ in range(5)),
        "peak": round(peak / 2**20),
        "result": round(result / 2**20),
    }


def import_seconds(name):
    return seconds(importlib.import_module, name)


def floor(length):
    """Milliseconds of this machine for the two products and the exponentials of one sample, in NumPy."""
    import numpy as np

    q = np.random.default_rng(0).normal(size=(HEADS, length, SIZE)).astype("float32")
    k = np.ascontiguousarray(q.transpose(0, 2, 1))

    def work():
        for head in range(HEADS):
            for start in range(0, length, 64):
                np.exp(q[head, start : start + 64] @ k[head]) @ q[head]

    return round(1e3 * min(seconds(work) for _ in range(5)), 2)


def in_a_process(backend, *arguments, peers=False, **environment):
    """What the function named first in `arguments` returns."""
    settings = {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    if peers:
        settings["PYTHONPATH"] = str(ROOT / ".venv" / "peers")
    child = subprocess.run(
        [sys.executable, __file__, json.dumps(arguments), *(a for a in arguments if isinstance(a, str))],
        env=os.environ | settings | environment,
        capture_output=True,
        text=True,
    )
    if child.returncode:
        raise RuntimeError(child.stderr)
    return json.loads(child.stdout.splitlines()[-1])


def capture(backend):
    """Time, in processes that keep freed memory, and peak memory, in processes as they are."""
    result = {}
    for who, arguments in {"ours": ("ours",), "original": ()}.items():
        taken = [
            in_a_process(backend, "eager_capture", 10_000, *arguments, peers=who == "original", **environment)
            for environment in (KEEP_MEMORY, {})
        ]
        result[who] = {"seconds": round(taken[0]["seconds"], 3), "peak": taken[1]["peak"], "result": taken[1]["result"]}
    return result


def main():
    rows, memories, captures, imports = [], [], [], []
    for backend, name in BACKENDS.items():
        for length in LENGTHS:
            for dropout in (0.0, 0.1):
                row = in_a_process(backend, "speed", length, dropout, "ours", "with scores", **KEEP_MEMORY)
                others = [in_a_process(backend, "speed", length, dropout, "original", peers=True, **KEEP_MEMORY)]
                if backend == "torch":
                    others.append(in_a_process(backend, "torch_speed", length, dropout, "torch", **KEEP_MEMORY))
                    others.append(
                        in_a_process(
                            backend, "torch_speed", length, dropout, "pytorch-forecasting", peers=True, **KEEP_MEMORY
                        )
                    )
                for other in others:
                    for what, ratios_of in other.items():
                        row[what] |= {who: ratio for who, ratio in ratios_of.items() if who != "plain"}
                rows.append({"backend": name, "length": length, "dropout": dropout, **row})
                print(json.dumps(rows[-1]), flush=True)
        of_inference = {
            who: in_a_process(backend, "memory", "predict_on_batch", who, 8192, 0.1) for who in ("ours", "plain")
        }
        of_training = {
            who: in_a_process(backend, "memory", "train_on_batch", who, 2048, 0.0, peers=who == "original")
            for who in ("ours", "plain", "original")
        }
        memories.append({"backend": name, "predict": of_inference, "train": of_training})
        print(json.dumps(memories[-1]), flush=True)
        captures.append({"backend": name, **capture(backend)})
        print(json.dumps(captures[-1]), flush=True)
        for _ in range(5):
            taken = {
                "keras": in_a_process(backend, "import_seconds", "keras"),
                "ours": in_a_process(backend, "import_seconds", "kerasfactory.layers"),
                "original": in_a_process(backend, "import_seconds", "kerasfactory.layers", peers=True),
            }
            imports.append({"backend": name, **{who: round(of_who, 2) for who, of_who in taken.items()}})
        print(json.dumps(imports[-1]), flush=True)
    packages = ("keras", "tensorflow", "jax", "torch", "numpy")
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {package: importlib.metadata.version(package).partition("+")[0] for package in packages},
        "floor": {length: floor(length) for length in LENGTHS},
        "rows": rows,
        "memory": memories,
        "capture": captures,
        "import": imports,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        function, *arguments = json.loads(sys.argv[1])
        print(json.dumps(globals()[function](*[a for a in arguments if a != "ours" or function != "eager_capture"])))
