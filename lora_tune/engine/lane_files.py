"""A lane between two of its steps, as a folder that another process can go on from.

The folder has the lane's state, from its hold step on the state that it holds for the next rung, and as
JSON its readings and what was counted of it. Only what is whole and of the same job is read; anything else
counts as not being there, since a lane can always begin its segment again.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lora_tune.engine.lane import Lane, load_state, save_state
from lora_tune.files import is_complete, publish_folder
from lora_tune.records import LaneJob, Point

HELD_FILE = "held_state.safetensors"
PROGRESS_FILE = "progress.json"

# What a job asks for after its last step, and where its files are, changes nothing in how it trains.
_NOT_TRAINING = frozenset(
    {
        "eval_split",
        "eval_dtype",
        "eval_rows",
        "metrics",
        "loss_limits",  # held against the points anew when they are replayed
        "start_folder",
        "result_folder",
        "state_folder",
    }
)


def job_key(job: LaneJob, settings: Mapping[str, object]) -> str:
    """Return a name of all that the numbers of a segment depend on: the job, and what all lanes share."""
    fields = {name: value for name, value in asdict(job).items() if name not in _NOT_TRAINING}
    text = json.dumps({"job": fields, "settings": settings}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def save_lane(lane: Lane, folder: Path, *, key: str) -> None:
    """Publish where a lane is, all of it or nothing; what was saved of it before is replaced.

    Args:
        lane: Between two steps, all its readings noted.
        folder: Where.
        key: The ``job_key`` of its job.
    """
    progress = {
        "key": key,
        "points": [
            [p.step, p.train_loss, p.learning_rate, p.grad_norm, p.num_tokens] for p in lane.points
        ],
        "base_losses": list(lane.base_losses.items()),
        "wall_s": lane.wall_s,
        "pack_lanes": lane.pack_lanes,
    }
    state = lane.state()
    tensors = [*state.values(), *(lane.held or {}).values()]
    with publish_folder(folder, expected_bytes=sum(t.nbytes for t in tensors)) as staging:
        save_state(state, staging)
        if lane.held is not None:
            save_file(lane.held, staging / HELD_FILE)
        # Python's own numbers: a gradient norm may be infinite, and every digit counts
        (staging / PROGRESS_FILE).write_text(json.dumps(progress), encoding="utf-8")


def load_lane(job: LaneJob, *, key: str) -> Lane | None:
    """Return the job's lane as it was saved, parked; None if that is not there, damaged or another's."""
    folder = job.state_folder
    if folder is None:
        return None
    try:
        progress = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
        if progress["key"] != key or not is_complete(folder):
            return None
        lane = Lane(
            job=job,
            adapter=None,
            optimizer=None,
            step=job.start_step,
            parked=load_state(folder),
            held=load_file(folder / HELD_FILE) if (folder / HELD_FILE).exists() else None,
            wall_s=float(progress["wall_s"]),
            pack_lanes=int(progress["pack_lanes"]),
        )
        base_losses = {int(step): float(loss) for step, loss in progress["base_losses"]}
        lane.replay((_point(*values) for values in progress["points"]), base_losses)
        return lane if lane.step == int(lane.state()["step"]) else None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def _point(step: int, loss: float, rate: float, norm: float, tokens: int) -> Point:
    return Point(step=step, train_loss=loss, learning_rate=rate, grad_norm=norm, num_tokens=tokens)
