"""What dpo_kit takes and does on one GPU, in one command of at most 8 minutes without network; on a CPU to try it out.

    python examples/benchmark/gpu.py [out=gpu] [size=0.5b,1.5b,7b|5m] [limit=470] [device=cuda|cpu]
                                     [part=train,demo,function,four]

On a machine with CUDA PyTorch and the packages in a folder: `PYTHONPATH=$PWD/site python3 examples/benchmark/gpu.py`.

train     Qwen2's architecture in three sizes (random weights; 7b with LoRA), prompt-heavy and answer-heavy pairs to
          2,048 tokens: stock `trl dpo` as it comes, without checkpointing, dpo_kit with its defaults; besides what the
          probe costs, and how exact shared prompts are
demo      seconds of `python -m dpo_kit`
function  each method, LoRA, QLoRA, online, kill and resume, a sweep, tools, on a small model: did it run?
four      a sweep of four betas and `trl dpo`, as commands

Each line is printed, and `out`/gpu.json written, as soon as a row is known. The script keeps its own clock: parts are
in order of importance, and a row that no longer fits says so. The tables at the end are Markdown, `out`/gpu.md too.
"""

import contextlib
import json
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from dpo_kit.errors import did_you_mean
from dpo_kit.run.files import write_json, write_text
from dpo_kit.run.report.markdown import inline, table

OPTIONS = {"out": "gpu", "size": "", "limit": "470", "device": "", "part": "train,demo,function,four"}
SIZES = {"cuda": ("0.5b", "1.5b", "7b"), "cpu": ("5m",)}
SHAPES = ("prompt-heavy", "answer-heavy")
ARMS = {"ours": "dpo_kit", "equal": "`trl dpo`, no checkpointing", "stock": "`trl dpo` as it comes"}
TUNING = {"7b": ("lora",), "5m": ("full", "lora")}  # others: full
WARM = {"cuda": 2, "cpu": 1}  # steps that are left out: kernels are chosen, and the optimizer's state is made
CELLS = {  # pairs at a time, so that all fit 80 GB; batches a step; timed steps; seconds that ours and a stock arm take
    ("0.5b", "prompt-heavy"): (8, 1, 20, 15, 20),
    ("0.5b", "answer-heavy"): (4, 2, 10, 15, 20),
    ("1.5b", "prompt-heavy"): (4, 2, 8, 15, 15),
    ("1.5b", "answer-heavy"): (2, 4, 6, 20, 20),
    ("7b", "prompt-heavy"): (2, 2, 6, 25, 15),
    ("7b", "answer-heavy"): (1, 2, 6, 25, 15),
    ("5m", "prompt-heavy"): (4, 1, 3, 10, 10),
    ("5m", "answer-heavy"): (1, 2, 2, 10, 10),
}
FEW = {"0.5b": 896, "5m": 256}  # hidden size of the four layers on which exactness is measured
EPOCH, BETAS = 640, 4  # pairs of the sweep that is worked out from the parts
RUN = 300  # steps of the run whose probe is worked out, evaluated every tenth of it, as is dpo_kit's default
ENDS = {"train": 0.7, "demo": 0.78, "function": 1.0, "four": 1.0}  # of the limit, where other parts follow
GIB = 2**30


# --- what is measured ------------------------------------------------------------------------------------------------


def read_options(arguments):
    """The options, each checked. SystemExit names what is mistyped."""
    for word in arguments:
        if "=" not in word:
            raise SystemExit(f"options are key=value, got {word}")
    given = dict(word.split("=", 1) for word in arguments)
    for key in given:
        if key not in OPTIONS:
            raise SystemExit(f"unknown: {key}{did_you_mean(key, OPTIONS)}; known: {', '.join(OPTIONS)}")
    options = OPTIONS | given
    options["device"] = options["device"] or find_device()
    options["size"] = options["size"] or ",".join(SIZES.get(options["device"], ()))
    known = {"device": SIZES, "part": ENDS, "size": {size for size, _ in CELLS}}
    for key, values in known.items():
        for value in options[key].split(","):
            if value not in values:
                raise SystemExit(f"{key}={value} is not one of {', '.join(sorted(values))}")
    if not options["limit"].isdigit():
        raise SystemExit(f"limit must be whole seconds, got {options['limit']}")
    return options


def find_device():
    """cuda where a driver shows a card, else cpu; without importing PyTorch, which takes seconds."""
    return "cuda" if Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists() else "cpu"


def train_rows(options):
    """Rows of dpo_kit's process, then those of TRL's: the one changes TRL where it is imported."""
    on_gpu, sizes = options["device"] == "cuda", options["size"].split(",")
    longer = 2 if on_gpu else 1
    ours, stock = [], []
    for size in sizes:
        for tuning in TUNING.get(size, ("full",)):
            for shape in SHAPES:
                rows, accumulate, steps, seconds, stock_seconds = CELLS[size, shape]
                cell = {"size": size, "tuning": tuning, "shape": shape, "longer": longer}
                cell |= {"rows": rows, "accumulate": accumulate, "steps": steps, "warm": WARM[options["device"]]}
                for arm in ARMS:
                    kind, needs = ("ours", seconds) if arm == "ours" else ("stock", stock_seconds)
                    row = {"key": f"{size} {tuning} {shape} {arm}", "what": kind, "arm": arm, "needs": needs, **cell}
                    (ours if arm == "ours" else stock).append(row)
    first = ours[0]
    probe = first | {"key": "probe", "what": "probe", "steps": 22, "every": 8, "held_out": 200, "needs": 40}
    if not on_gpu:
        probe |= {"steps": 3, "every": 2, "held_out": 17}
    sampling = {"key": "sampling", "what": "sampling", "size": sizes[0], "rows": 512, "tokens": 64, "needs": 20}
    if not on_gpu:
        sampling |= {"rows": 64, "tokens": 8}
    ours = [ours[0], *exactness_rows(sizes[0]), *ours[1:2], probe, *ours[2:], sampling]
    begin = [{"key": "card", "what": "product", "needs": 5}]
    return [imports_row("dpo_kit"), *begin, *ours], [imports_row("TRL"), *stock]


def imports_row(who):
    return {"key": f"imports {who}", "what": "imports", "who": who, "needs": 0}


def exactness_rows(size):
    """Few layers of a real width, once with and once without a sliding window."""
    hidden = FEW.get(size, 896)
    config = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": 4, "vocab_size": 4096}
    config |= {"num_attention_heads": hidden // 64 if hidden > 256 else 8, "num_key_value_heads": 2}
    common = {"what": "exactness", "needs": 10, "config": config, "pairs": 4, "longest": 640 if hidden > 256 else 96}
    return [
        common | {"key": "exactness", "window": None},
        common | {"key": "exactness, sliding window", "window": common["longest"] // 8},
    ]


def function_rows(options):
    """Rows of one process that trains, and of one that starts commands beside it."""
    model = "small" if options["device"] == "cuda" else "tiny"  # of 5M parameters, or the embedded one
    full = {"what": "method", "tuning": "full", "model": model, "needs": 8}
    methods = [full | {"key": method, "method": method} for method in ("dpo", "ipo", "kto", "orpo", "cpo", "simpo")]
    small = {"method": "dpo", "model": model, "needs": 10}
    tools = [
        {"key": "evaluate", "tool": "evaluate", "words": ["parts=[preferences,win_rate]", "win_rate.limit=16"]},
        {"key": "export", "tool": "export", "words": []},
    ]
    here = [
        *methods,
        small | {"key": "dpo, LoRA", "what": "method", "tuning": "lora"},
        small | {"key": "dpo, QLoRA", "what": "method", "tuning": "qlora"},
        full | {"key": "online_dpo, embedded lab", "method": "online_dpo", "model": "tiny", "needs": 15},
        *({"what": "tool", "of": "dpo", "needs": 8} | tool for tool in tools),
    ]
    commands = [
        small | {"key": "kill and resume", "what": "resume", "tuning": "full", "needs": 50},
        small | {"key": "sweep of four betas", "what": "sweep", "tuning": "full", "needs": 40},
        small | {"key": "plan", "what": "plan", "tuning": "full", "needs": 20},
    ]
    return here, commands


def part_rows(part, options):
    """Rows of each process of a part, and how many of them run at a time."""
    if part == "train":
        return train_rows(options), 1
    if part == "function":
        return function_rows(options), 2
    size = options["size"].split(",")[0]
    four = {"key": "four betas, as commands", "what": "four", "size": size, "shape": SHAPES[0], "needs": 100}
    four |= {"longer": 2, "pairs": 320} if options["device"] == "cuda" else {"longer": 1, "pairs": 16}
    demo = {"key": "demo", "what": "demo", "needs": 20}
    return ([[demo]] if part == "demo" else [[four]]), 1


# --- the clock, and the processes ------------------------------------------------------------------------------------


class Record:
    """All rows, printed and written as they come."""

    def __init__(self, out, options):
        self.out, self.started = Path(out), time.time()
        self.kept = {"options": options, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "rows": {}}

    def add(self, row, **values):
        self.kept["rows"][row["key"]] = row | values
        self.kept["seconds"] = time.time() - self.started
        write_json(self.out / "gpu.json", self.kept)
        if values["outcome"] != "started":
            print(f"{self.kept['seconds']:6.1f} s  {describe(self.kept['rows'][row['key']])}", flush=True)


def describe(row):
    """A row in one line."""
    what = f"{row['key']}: {row['outcome']}" + (f" ({row['why']})" if row.get("why") else "")
    figures = {name: row[name] for name in ("seconds", "pairs", "rate", "detail", "step") if name in row}
    figures |= {f"gradient, {way}": apart["gradient"] for way, apart in row.get("apart", {}).items()}
    shown = ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
    )
    return f"{what}; {shown}" if shown else what


def run_part(rows_of_processes, at_once, record, options, work, until):
    """Start a process for each list of rows, `at_once` at a time, and record what they say, until it is `until`."""
    waiting, running, said = list(rows_of_processes), {}, queue.Queue()
    try:
        while (waiting or running) and time.time() < until:
            while waiting and len(running) < at_once:
                rows = waiting.pop(0)
                running[start(rows, options, work, until, said)] = rows
            with contextlib.suppress(queue.Empty):
                process, line = said.get(timeout=0.2)
                hear(process, line, running, waiting, record)
    finally:
        for process in running:
            end(process)
    for rows in [*running.values(), *waiting]:
        give_up(rows, record)


def start(rows, options, work, until, said):
    """A process that measures `rows`; what it prints comes to `said`, in lines, and None at its end."""
    told = {"rows": rows, "work": str(work), "device": options["device"], "born": time.time(), "until": until}
    script = Path(__file__).with_name("gpu_parts.py")
    process = subprocess.Popen(
        [sys.executable, str(script), json.dumps(told)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )

    def listen():
        for line in process.stdout:
            said.put((process, line))
        process.wait()
        said.put((process, None))

    threading.Thread(target=listen, daemon=True).start()
    return process


def hear(process, line, running, waiting, record):
    """One line of a process, or its end; where it died in a row, the rows after that one are for a new process."""
    rows = running.get(process)
    if rows is None:
        return
    if line is None:
        del running[process]
        left = [row for row in rows if record.kept["rows"].get(row["key"], {}).get("outcome") in (None, "started")]
        if left:
            why = f"its process ended with {process.returncode}: {getattr(process, 'last', '')}"
            record.add(left[0], outcome="failed", why=why[-300:])
            waiting.extend([left[1:]] if left[1:] else [])
    elif line.startswith("ROW "):
        values = json.loads(line[4:])
        record.add(next(row for row in rows if row["key"] == values["key"]), **values)
    elif line.strip():
        process.last = line.strip() if not line.startswith("PEAK_MIB") else getattr(process, "last", "")
        with (record.out / "gpu.log").open("a") as log:
            log.write(line)


def end(process):
    """Kill a process with all that it has started, in sessions of their own too."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid)
        for each in [family, *family.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    process.wait()


def give_up(rows, record):
    """What has not ended of `rows` is recorded as stopped, or as not tried."""
    for row in rows:
        now = record.kept["rows"].get(row["key"], {}).get("outcome")
        if now in (None, "started"):
            record.add(row, outcome="stopped" if now else "not tried", why="time")


# --- the tables ------------------------------------------------------------------------------------------------------


def render(kept):
    """All tables, from what was recorded."""
    rows = kept["rows"]
    card = rows.get("card", {})
    head = "No GPU: a CPU, to try the script out" if kept["options"]["device"] == "cpu" else "One GPU"
    if ran(card):
        head = head if card["card"] == "cpu" else f"One {card['card']} ({gib(card['memory'])} GiB)"
        head += f", PyTorch {card['torch']}, Python {card['python']}; a bf16 product of {card['size']}³ reaches "
        head += f"{card['rate'] / 1e12:,.1f} TFLOP/s, which MFU is measured against."
    parts = [head, training_table(rows), ratio_table(rows), sweep_line(rows), probe_table(rows), exactness_table(rows)]
    parts += [outcome_table(rows), not_run(rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def cells(rows):
    """(size, tuning, shape) → rows by arm."""
    found = {}
    for row in rows.values():
        if row["what"] in ("ours", "stock"):
            found.setdefault((row["size"], row["tuning"], row["shape"]), {})[row["arm"]] = row
    return found


def ran(row):
    return row is not None and row.get("outcome") == "ran"


def seconds_of(row):
    """Of training on the timed pairs, with the reference pass over as many."""
    return row["seconds"] + row["pairs"] * reference_per_pair(row)


def reference_per_pair(row):
    return row["reference"] / row["reference_pairs"] if row.get("reference_pairs") else 0.0


def training_table(rows):
    headings = ["model, pairs", "arm", "s", "pairs/s", "distinct tokens/s", "MFU", "peak GiB", "planned"]
    headings += ["reference tokens/s", "steps × pairs", "checkpointing"]
    rate = rows.get("card", {}).get("rate")
    lines = []
    for (size, tuning, shape), arms in cells(rows).items():
        for arm, label in ARMS.items():
            row = arms.get(arm, {})
            first = [f"{size} {tuning}, {shape}", label]
            lines.append(first + (figures(row, rate) if ran(row) else [why_not(row), *[""] * 8]))
    if not lines:
        return ""
    note = (
        "s: training on the timed pairs with the reference pass over as many (in stock's steps it is in each). "
        "Distinct: no padding, a pair's prompt once. MFU: (6 · weights without embeddings + head on scored tokens + "
        "attention) · distinct tokens / seconds of the steps alone, with 4 for 6 where weights are frozen (LoRA); for "
        "the reference nothing is credited. Peak: what tensors took at most, reference pass in; planned: what "
        "`dpo_kit.cli.plan` foresaw. The first steps are left out."
    )
    return table(headings, lines, left=2) + "\n\n" + note


def figures(row, rate):
    spent = seconds_of(row)
    reference = ""
    if row.get("reference"):
        speed = row["reference_tokens"] / row["reference"]
        reference = f"{speed:,.0f} ({speed / (row['distinct'] / row['seconds']):.1f} × training)"
    return [
        f"{spent:.2f}",
        f"{row['pairs'] / spent:,.2f}",
        f"{row['distinct'] / spent:,.0f}",
        f"{row['operations'] / row['seconds'] / rate:.3f}" if rate else "",
        gib(row["peak"]),
        gib(row.get("planned")),
        reference,
        f"{row['steps']} × {row['pairs'] // row['steps']} ({row['rows']} at a time)",
        "on" if row["checkpointing"] else "off",
    ]


def gib(size):
    return f"{size / GIB:.1f}" if size else "–"


def why_not(row):
    return inline(": ".join(filter(None, (row.get("outcome", "not tried"), row.get("why")))))


def ratio_table(rows):
    headings = ["model, pairs", "speed: as it comes", "no checkpointing", "four betas", "memory: of no checkpointing"]
    lines = []
    for (size, tuning, shape), arms in cells(rows).items():
        ours, stock, equal = (arms.get(arm) for arm in ("ours", "stock", "equal"))
        if not ran(ours):
            continue
        speed = [ratio(pair_rate(ours), pair_rate(other)) if ran(other) else "–" for other in (stock, equal)]
        memory = ratio(ours["peak"], equal["peak"]) if ran(equal) and ours["peak"] else "–"
        lines.append([f"{size} {tuning}, {shape}", *speed, four_betas(rows, ours, stock), memory])
    if not lines:
        return ""
    note = (
        "dpo_kit against stock, pairs/s with the reference pass in. Four betas are worked out from the parts, for "
        f"{EPOCH} pairs: imports, start and training of four `trl dpo`, against imports once, one reference pass, and "
        "start and training of four runs of dpo_kit. Models are made in memory in both, not read from a disk."
    )
    imports = [rows.get(f"imports {who}") for who in ("dpo_kit", "TRL")]
    if all(map(ran, imports)):
        own, theirs = (row["seconds"] for row in imports)
        note += f" Imports took {own:.1f} s with dpo_kit, {theirs:.1f} s with TRL alone."
    return table(headings, lines) + "\n\n" + note


def sweep_line(rows):
    row = rows.get("four betas, as commands")
    if not ran(row):
        return ""
    return (
        f"Four betas as commands, imports in and models read from the disk, {row['pairs']} {row['shape']} pairs, "
        f"{row['size']}: the sweep took {row['ours']:.0f} s, one `trl dpo` {row['stock']:.0f} s, of which four are "
        f"{row['ratio']:.1f} times the sweep."
    )


def pair_rate(row):
    return row["pairs"] / seconds_of(row)


def ratio(one, other):
    return f"{one / other:.2f}"


def four_betas(rows, ours, stock):
    imports = [rows.get(f"imports {who}") for who in ("dpo_kit", "TRL")]
    if not (ran(stock) and all(map(ran, imports))):
        return "–"
    own, theirs = (each["seconds"] for each in imports)
    training = [EPOCH * each["seconds"] / each["pairs"] for each in (ours, stock)]
    one_sweep = own + EPOCH * reference_per_pair(ours) + BETAS * (ours["start"] + training[0])
    return ratio(BETAS * (theirs + stock["start"] + training[1]), one_sweep)


def probe_table(rows):
    row = rows.get("probe")
    if not ran(row):
        return ""
    by_moment = {}
    for moment, step, seconds in row["spent"]:
        moment = "half-way" if moment == "evaluation" and step in row["half_way"] else moment
        by_moment.setdefault(moment, {}).setdefault(step, 0.0)
        by_moment[moment][step] += seconds
    each = {moment: statistics.mean(by_step.values()) for moment, by_step in by_moment.items()}
    plain = each.get("evaluation", each.get("half-way", 0.0))
    half_way, stock = each.get("half-way", plain), each.get("TRL", 0.0)
    probe = each.get("start", 0.0) + 9 * plain + half_way + each.get("end", 0.0)
    run = RUN * (row["step"] + row["rows"] * row["accumulate"] * reference_per_pair(row)) + 10 * stock
    lines = [[moment, f"{seconds:.2f}"] for moment, seconds in each.items()] + [
        ["a training step", f"{row['step']:.3f}"]
    ]
    said = (
        f"{row['size']} {row['tuning']}, {row['shape']}: in a run of {RUN} steps that is evaluated ten times, the "
        f"default, the probe takes {100 * probe / run:.1f} % of the time of the rest (reference pass, steps, TRL's "
        f"evaluations), worked out from {row['steps']} timed steps and these measurements."
    )
    return said + "\n\n" + table(["the probe at", "seconds"], lines)


def exactness_table(rows):
    lines = []
    for row in rows.values():
        if row["what"] == "exactness" and ran(row) and row["shares"]:
            for name, apart in row["apart"].items():
                values = [f"{apart[part]:.1e}" for part in ("hidden", "loss", "gradient", "worst")]
                lines.append([row["key"], name, *values, f"`{apart['worst_weight']}`"])
        elif row["what"] == "exactness" and ran(row):
            lines.append([row["key"], f"not shared: {inline(row['why_not'])}", "", "", "", "", ""])
    headings = ["", "from padded rows in fp32, relative", "hidden states", "loss", "all gradients", "worst", "of"]
    return table(headings, lines, left=2) if lines else ""


def outcome_table(rows):
    """What is no timed training: did it run?"""
    kinds = ("sampling", "method", "tool", "plan", "resume", "sweep", "demo")
    lines = [
        [inline(row["key"]), row["outcome"], inline(row.get("why") or row.get("detail", ""))]
        for row in rows.values()
        if row["what"] in kinds
    ]
    return table(["on this device", "outcome", ""], lines, left=3) if lines else ""


def not_run(rows):
    names = [row["key"] for row in rows.values() if row["outcome"] in ("not tried", "stopped")]
    return (
        "Not run, or stopped: " + (", ".join(names) if names else "nothing that was asked for") + "; several devices."
    )


def main(arguments):
    options = read_options(arguments)
    record = Record(options["out"], options)
    record.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        parts = options["part"].split(",")
        for part in parts:
            share = ENDS[part] if part != parts[-1] else 1.0
            until = record.started + share * int(options["limit"])
            run_part(*part_rows(part, options), record, options, work, until)
    tables = render(record.kept)
    write_text(record.out / "gpu.md", tables)
    print(f"\n{tables}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
