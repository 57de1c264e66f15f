"""report.md: templates in which every value is escaped, and the pieces they are made of.

Names, paths and reasons come from users, data sets and other programs. The environment
escapes each value that a template shows, unless the code marked it as ``Markdown``.
"""

import re
from collections.abc import Iterable, Sequence
from functools import cache

import jinja2

from lora_tune.records import LanePlan, StudySnapshot
from lora_tune.report import formatting as fmt
from lora_tune.report import memory, probe, wording
from lora_tune.report.summary import ReportSummary, measured_peak, ranked, summarize
from lora_tune.report.tables import TRIAL_COLUMNS
from lora_tune.units import format_bytes, format_duration

_SPECIAL = re.compile(r"[\\`*\[\]|~$]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])")
_LINE_START = re.compile(r"^(#{1,6}(?=\s|$)|[-+](?=[\s-]|$)|=+|\d+(?=[.)](\s|$)))")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


class Markdown(str):
    """Text that is Markdown already and must not be escaped again."""

    __slots__ = ()


def markdown_escape(text: str) -> str:
    r"""Return text that Markdown and HTML show as it is, on one line, also in a table's cell.

    Underscores inside a word are left alone: Markdown gives them no meaning.

    >>> markdown_escape("a|b <script> lora_alpha *x*\n# y")
    'a\\|b &lt;script&gt; lora_alpha \\*x\\* # y'
    """
    line = _escape_inline(text)
    start = _LINE_START.match(line)
    if start is None:
        return line
    cut = start.end() if start[1].isdigit() else 0
    return f"{line[:cut]}\\{line[cut:]}"


def _escape_inline(text: str) -> str:
    """Escape for a place where no line begins, such as a cell: a ``-`` stays a ``-`` there."""
    line = "".join(_ENTITIES.get(c, c) for c in fmt.one_line(text))
    return _SPECIAL.sub(lambda match: "\\" + match[0], line)


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> Markdown:
    """Return a table, its cells escaped and padded so that the source reads well too."""
    table = [[_escape_inline(cell) for cell in row] for row in (headers, *rows)]
    widths = [max(3, *(len(row[i]) for row in table)) for i in range(len(headers))]
    table.insert(1, ["-" * width for width in widths])
    lines = ("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in table)
    return Markdown("\n".join(lines))


def code_block(text: str, language: str = "") -> Markdown:
    """Return a fenced block, its fence longer than any run of backticks in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markdown(f"{fence}{language}\n{text}\n{fence}")


def python_literal(text: str) -> Markdown:
    """Return text as a Python string in ASCII, on one line.

    >>> print(python_literal("org/model"))
    "org/model"
    """
    literal = ascii(text)
    plain = literal[1:-1]
    return Markdown(f'"{plain}"' if '"' not in plain and "\\" not in plain else literal)


@cache
def environment() -> jinja2.Environment:
    """Return the templates of this room, with Markdown escaping of every value."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("lora_tune.report"),
        autoescape=False,  # HTML escaping alone would leave Markdown open; see ``finalize``
        finalize=lambda value: (
            value if isinstance(value, Markdown) else markdown_escape(str(value))
        ),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render_markdown(snapshot: StudySnapshot) -> str:
    """Return report.md of a study, finished or not."""
    summary = summarize(snapshot)
    template = environment().get_template("report.md.jinja")
    return template.render(
        lock=snapshot.lock,
        summary=summary,
        outcome=summary.outcome.value,
        recommendation=wording.recommendation(summary),
        settings=_settings(snapshot, summary),
        certainty=wording.certainty(summary),
        trials=_trials(snapshot),
        rungs=_rungs(summary),
        uses_fewer_rows=any(r.eval_rows < r.selection_rows for r in summary.rungs),
        memory=_memory(snapshot, summary),
        probe=_probe(snapshot),
        probe_sentence=probe.probe_sentence(snapshot.lock.plan),
        probe_cost=_probe_cost(snapshot),
        memory_sentences=wording.memory_sentences(summary),
        memory_spread=_memory_spread(summary),
        memory_plot=_memory_plot(summary),
        memory_packs=_memory_packs(snapshot),
        data=_data(snapshot),
        environment=_environment(snapshot),
        cost=_cost(summary),
        schedule=wording.schedule_text(snapshot.lock),
        load=load_adapter_context(snapshot, adapter="adapter"),
        command=code_block(fmt.one_line(snapshot.lock.command), "sh"),
    )


def load_adapter_context(snapshot: StudySnapshot, *, adapter: str) -> dict[str, object]:
    """Return what ``load_adapter.jinja`` needs.

    The compute type is the one of the confirmation, so that the reported loss is met again.
    """
    model = snapshot.lock.model
    base = model.hub_id
    from_gguf = model.base.lower().endswith(".gguf")
    if base is None and not from_gguf:
        base = model.base
    dtype = snapshot.lock.plan.compute_dtype
    if snapshot.confirmation is not None:
        dtype = snapshot.confirmation.winner_evaluation.compute_dtype
    return {
        "base": python_literal(base or "path/to/the/base/model"),
        "known": base is not None,
        "revision": python_literal(model.revision) if model.hub_id and model.revision else None,
        "adapter": python_literal(adapter),
        "nf4": model.quantization == "nf4",
        "dtype": Markdown(dtype if dtype in ("bfloat16", "float16") else "float32"),
        "gguf": re.split(r"[\\/]", model.base)[-1] if from_gguf else None,
    }


def _settings(snapshot: StudySnapshot, summary: ReportSummary) -> Markdown | None:
    config, lock = summary.config, snapshot.lock
    if config is None:
        return None
    scaling = "lora_alpha / sqrt(rank)" if config.use_rslora else "lora_alpha / rank"
    modules = sorted({name.rpartition(".")[2] for name in config.target_modules})
    rows = [
        ("rank", str(config.rank)),
        ("lora_alpha", fmt.format_plain(config.lora_alpha)),
        ("scaling", f"{fmt.format_plain(config.scaling)} ({scaling})"),
        ("lora_dropout", fmt.format_plain(config.lora_dropout)),
        (
            "target modules",
            f"{config.target_set}: {', '.join(modules)} "
            f"({fmt.plural(len(config.target_modules), 'layer')})",
        ),
        ("learning rate", fmt.format_scientific(config.learning_rate)),
        ("optimizer", wording.setting_text(lock, "train", "optimizer")),
        ("weight decay", wording.setting_text(lock, "train", "weight_decay")),
        ("gradient clipping", f"norm {wording.setting_text(lock, 'train', 'max_grad_norm')}"),
        ("effective batch size", wording.setting_text(lock, "train", "effective_batch_size")),
        ("steps", str(max(lock.rungs, default=0))),
        ("warm-up steps", str(lock.warmup_steps)),
        ("schedule", wording.decay_text(lock)),
        ("longest row", f"{wording.setting_text(lock, 'data', 'max_length')} tokens"),
    ]
    return markdown_table(("setting", "value"), rows)


def _trials(snapshot: StudySnapshot) -> Markdown:
    rows = [[c.text(t) for c in TRIAL_COLUMNS] for t in ranked(snapshot.trials)]
    return markdown_table([c.header for c in TRIAL_COLUMNS], rows)


def _rungs(summary: ReportSummary) -> Markdown:
    headers = (
        "rung",
        "steps",
        "rows",
        "trials",
        "went on",
        "best",
        "loss",
        "median",
        "tokens",
        "lane time",
    )
    return markdown_table(
        headers,
        [
            (
                str(r.rung),
                str(r.steps),
                f"{r.eval_rows} of {r.selection_rows}",
                str(r.num_trials),
                fmt.NOTHING if r is summary.rungs[-1] else str(r.num_promoted),
                fmt.NOTHING if r.best_trial is None else f"trial {r.best_trial}",
                fmt.format_loss(r.best_loss),
                fmt.format_loss(r.median_loss),
                fmt.format_count(r.num_tokens),
                format_duration(r.lane_s),
            )
            for r in summary.rungs
        ],
    )


def _memory(snapshot: StudySnapshot, summary: ReportSummary) -> Markdown:
    plan = snapshot.lock.plan
    predicted = max((t.predicted_bytes for t in snapshot.trials if measured_peak(t)), default=0)
    kind = "peak allocated" if plan.device.startswith("cuda") else "resident memory"
    rows = [
        ("budget", _budget_text(plan)),
        ("highest prediction of a trained trial", fmt.format_memory(predicted)),
        (f"highest measured peak ({kind})", fmt.format_memory(summary.highest_peak_bytes)),
        ("lanes trained together", str(plan.lanes)),
        ("micro-batch per lane", str(plan.micro_batch_size)),
        ("gradient checkpointing", "on" if plan.gradient_checkpointing else "off"),
        ("low-rank products", _products_text(plan)),
    ]
    return markdown_table(("memory and packing", "value"), rows)


def _products_text(plan: LanePlan) -> str:
    if plan.group_rank == 0:
        return "one product a lane"
    return f"one product for neighbouring lanes, up to {plan.group_rank} ranks together"


def _probe(snapshot: StudySnapshot) -> Markdown | None:
    plan = snapshot.lock.plan
    if not plan.probe_readings:
        return None
    return markdown_table(probe.PROBE_HEADERS, probe.probe_rows(plan))


def _probe_cost(snapshot: StudySnapshot) -> str:
    """Say how long the probe took, beside the study if that is known."""
    seconds, wall_s = snapshot.lock.plan.probe_s, snapshot.wall_s
    text = f"{seconds:.1f} s"
    return f"{text}, {fmt.format_percent(seconds / wall_s)} of the study so far" if wall_s else text


def _budget_text(plan: LanePlan) -> str:
    text = format_bytes(plan.budget_bytes)
    if not plan.capacity_bytes:
        return text
    share = fmt.format_percent(plan.budget_bytes / plan.capacity_bytes)
    return f"{text} ({share} of {format_bytes(plan.capacity_bytes)})"


def _memory_spread(summary: ReportSummary) -> Markdown | None:
    if summary.memory is None or not summary.memory.spreads:
        return None
    return markdown_table(memory.SPREAD_HEADERS, memory.spread_rows(summary.memory))


def _memory_plot(summary: ReportSummary) -> Markdown | None:
    if summary.memory is None or not summary.memory.spreads:
        return None
    return code_block(memory.scatter_plot(summary.memory), "text")


def _memory_packs(snapshot: StudySnapshot) -> Markdown | None:
    readings = snapshot.memory.readings
    if not readings:
        return None
    return markdown_table(memory.PACK_HEADERS, memory.pack_rows(readings))


def _data(snapshot: StudySnapshot) -> Markdown:
    data = snapshot.lock.data
    rows = [
        ("source", data.source),
        ("format", data.format),
        ("chat template", data.chat_template),
        ("rows to train on", fmt.format_count(data.num_train)),
        ("rows to select on", fmt.format_count(data.num_selection)),
        ("rows to confirm on", fmt.format_count(data.num_confirmation)),
        ("training tokens", fmt.format_count(data.num_train_tokens)),
        ("of these with loss", fmt.format_count(data.num_train_labels)),
        ("longest row", f"{fmt.format_count(data.max_tokens)} tokens"),
        ("duplicates removed", fmt.format_count(data.num_duplicates)),
        ("rows that could not be read", fmt.format_count(data.num_bad_rows)),
        ("rows without a target token", fmt.format_count(data.num_unlabelled)),
        ("rows cut to length", fmt.format_count(data.num_truncated)),
        ("fingerprint (SHA-256)", data.sha256),
    ]
    return markdown_table(("data", "value"), rows)


def _environment(snapshot: StudySnapshot) -> Markdown:
    lock = snapshot.lock
    model = lock.model
    rows = [
        ("base model", model.base),
        ("hub id", model.hub_id or "not known"),
        ("revision", model.revision or "not known"),
        (
            "architecture",
            f"{model.architecture}, {fmt.format_count(model.num_parameters)} parameters",
        ),
        ("license of the base", model.license or "not known"),
        ("quantization", model.quantization),
        ("compute type", lock.plan.compute_dtype),
        ("device", lock.plan.device),
        *lock.hardware.items(),
        *lock.versions.items(),
        ("study file (SHA-256)", lock.spec_sha256),
        ("seed", wording.setting_text(lock, "study", "seed")),
        ("started", lock.created),
    ]
    return markdown_table(("environment", "value"), rows)


def _cost(summary: ReportSummary) -> Markdown:
    share = summary.steps_trained / summary.steps_if_all_full if summary.steps_if_all_full else 0
    speed = fmt.NOTHING
    if summary.tokens_per_s is not None:
        speed = f"{fmt.format_count(summary.tokens_per_s)} (loading and evaluation included)"
    device = "GPU" if summary.device.startswith("cuda") else "CPU"
    rows = [
        (
            f"wall time on the {device}",
            f"{format_duration(summary.wall_s)} ({summary.wall_s:.0f} s)",
        ),
        ("training tokens", fmt.format_count(summary.num_tokens)),
        ("tokens/s", speed),
        (
            "steps trained",
            f"{fmt.format_count(summary.steps_trained)}, {fmt.format_percent(share)} of "
            f"{fmt.format_count(summary.steps_if_all_full)} for all trials at full length",
        ),
    ]
    return markdown_table(("cost", "value"), rows)
