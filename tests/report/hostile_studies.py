"""Texts that would be markup, code or commands somewhere, and a study that has them wherever it may."""

from dataclasses import replace
from functools import cache
from pathlib import Path

from report_studies import finished_study

from lora_tune.records import Behaviour, Confirmation, StudySnapshot, TrialRecord

PAYLOADS = (
    "<script>document.title = 'pwned'; alert(1)</script>",
    "</script><script>alert(1)</script>",
    "</title></head><body onload=alert(1)>",
    "<img src=x onerror=alert(1)>",
    "<img src='https://example.org/pixel.png'>",
    "<svg onload=alert(1)><circle r=9></svg>",
    "<svg><script href='data:text/javascript,alert(1)'/></svg>",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "<a href='javascript:alert(1)'>click</a>",
    "javascript:alert(1)//",
    "<details open ontoggle=alert(1)>",
    "<style>body { display: none }</style>",
    "</style><link rel=stylesheet href=//example.org/x.css>",
    "*/ } body { display: none } /*",
    "<!-- a comment that does not end",
    "--> ]]> <![CDATA[ x ]]>",
    "<?xml version='1.0'?><!DOCTYPE x [<!ENTITY e SYSTEM 'file:///etc/passwd'>]>&e;",
    "&lt;b&gt; &amp; &#60;i&#62; &#x3c;u&#x3e; &quot;",
    "\" onmouseover=\"alert(1)\" x='' autofocus onfocus='alert(1)'",
    "' or `backticks` and ``` fences",
    "{{ 7 * 7 }} {% raw %} {{ lock.command }} {# gone #}",
    "${7 * 7} #{7 * 7} <%= 7 * 7 %> datum.x + toString()",
    "[click](javascript:alert(1)) ![pixel](https://example.org/p.png)",
    "<https://example.org> https://example.org [x]: https://example.org",
    "# heading\n\n- item\n\n> quote\n\n| a | b |\n| - | - |\n\n<b>bold</b>",
    "a|b|c **bold** __under__ ~~gone~~ $x^2$",
    "[bold red]rich[/bold red] [/] [link=https://example.org]x[/link]",
    "\x1b[31mred\x1b[0m \x1b]8;;https://example.org\x07link\x1b]8;;\x07 \x9b2J",
    "null\x00byte, bell\x07, delete\x7f, carriage\rreturn",
    "evil\u202etxt.exe \u2066isolate\u2069 \u200fright \ufeffmark",
    "line\u2028separator\u2029paragraph\u0085next",
    "half a pair \ud800 and \udc80 a byte that is no UTF-8",
    "__proto__ constructor prototype ../../etc/passwd C:\\windows\\x",
    "'; rm -rf ~ # $(touch /tmp/x) `id` && true",
    "long " + "x" * 4000,
    "e\u0301\u0323" * 40 + " \U0001f469\u200d\U0001f52c",
)
HARMLESS = "plain words"


@cache
def hostile_study(text: str) -> StudySnapshot:
    """Return the finished study with this text wherever a user, a data set or a program may put one."""
    study = finished_study(Path("reports") / text.replace("/", "_").replace("\x00", "")[:100])
    lock = study.lock
    assert study.confirmation is not None
    assert study.behaviour is not None
    return replace(
        study,
        lock=replace(
            lock,
            name=text,
            command=text,
            study_file=text,
            notes=(text, text),
            created=text,
            spec_sha256=text,
            versions={text: text},
            hardware={text: text, "device": text},
            model=replace(
                lock.model,
                base=f"{text}.gguf",
                hub_id=text,
                revision=text,
                architecture=text,
                model_type=text,
                license=text,
                quantization=text,
            ),
            data=replace(lock.data, source=text, format=text, sha256=text, chat_template=text),
            target_sets=tuple(
                replace(found, name=text, modules=(f"{text}.0.{text}", text))
                for found in lock.target_sets
            ),
        ),
        trials=tuple(_hostile_trial(trial, text) for trial in study.trials),
        confirmation=_hostile_confirmation(study.confirmation, text),
        behaviour=_hostile_behaviour(study.behaviour, text),
    )


def studies_of_hostile_trials() -> list[StudySnapshot]:
    """Return finished studies whose trials have a text of their own each, all texts in one of them."""
    study = finished_study()
    return [
        replace(
            study,
            trials=tuple(
                _hostile_trial(trial, text)
                for trial, text in zip(study.trials, PAYLOADS[start:] + PAYLOADS, strict=False)
            ),
        )
        for start in range(0, len(PAYLOADS), len(study.trials))
    ]


def _hostile_trial(trial: TrialRecord, text: str) -> TrialRecord:
    return replace(
        trial,
        reason=text,
        origin=text,
        suggested=replace(trial.suggested, target_set=text),
        config=replace(trial.config, target_set=text, target_modules=(f"a.0.{text}", text)),
    )


def _hostile_confirmation(found: Confirmation, text: str) -> Confirmation:
    def metrics(values: tuple) -> tuple:
        return tuple(
            replace(m, metric=f"{text}{m.metric}", reason=m.reason and text) for m in values
        )

    return replace(
        found,
        candidates=tuple(
            replace(c, config=replace(c.config, target_set=text, target_modules=(text,)))
            for c in found.candidates
        ),
        runs=tuple(replace(run, metrics=metrics(run.metrics), reason=text) for run in found.runs),
        base_metrics=metrics(found.base_metrics),
    )


def _hostile_behaviour(found: Behaviour, text: str) -> Behaviour:
    return replace(
        found,
        general_text=text,
        reason=text,
        samples=tuple(
            replace(
                sample,
                prompt=text,
                reference=text,
                answers=tuple(replace(answer, text=text) for answer in sample.answers),
            )
            for sample in found.samples
        ),
    )
