"""Reads back, without a network, what a finished run of a tracker holds. None of this uses verl_valgen's own code."""

from __future__ import annotations

import csv
import html
import io
import json
import re
import sqlite3
import struct
import time
import unicodedata
from pathlib import Path
from typing import Any


def read_wandb(run_dir: str | Path, timeout_s: float = 60.0) -> dict[int, dict[str, Any]]:
    """{step: {key: value}} of an offline run's folder (`wandb.run.settings.sync_dir`); tables as {"columns", "data"},
    of one that grows what the step added, and the number of additions before it that it stands for; HTML as text.

    Waits for the run's end to be written: `finish` returns a little earlier.
    """
    run_dir = Path(run_dir)
    deadline = time.monotonic() + timeout_s
    while True:
        records = [record for path in run_dir.glob("*.wandb") for record in wandb_records(path.read_bytes())]
        if any(record.HasField("exit") for record in records):
            break
        assert time.monotonic() < deadline, f"the run in {run_dir} was not finished"
        time.sleep(0.1)
    history: dict[int, dict[str, Any]] = {}
    for record in records:
        if record.HasField("history"):
            row = history_row(record.history.item)
            values = {key: _load_table(run_dir, value) for key, value in row.items()}
            history.setdefault(row["_step"], {}).update(values)
    return history


def history_row(items: Any) -> dict[str, Any]:
    """{key: value}; what was logged as a dict, a table's description too, is stored as one item per leaf."""
    row: dict[str, Any] = {}
    for item in items:
        *parents, key = item.nested_key or [item.key]
        target = row
        for parent in parents:
            target = target.setdefault(parent, {})
        target[key] = json.loads(item.value_json)
    return row


def wandb_records(data: bytes) -> list[Any]:
    """What is whole in the file of an offline run, whether the run was finished or not."""
    from wandb.proto.wandb_internal_pb2 import Record

    records, payload, offset = [], b"", 7  # after the file's header
    while offset + 7 <= len(data):
        num_left_in_block = 32768 - offset % 32768
        if num_left_in_block < 7:
            offset += num_left_in_block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, offset)
        if kind == 0 or offset + 7 + length > len(data):
            break  # not written to its end yet
        payload += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(Record.FromString(payload))
            payload = b""
    return records


def _load_table(run_dir: Path, value: Any) -> Any:
    if not (isinstance(value, dict) and "path" in value):
        return value
    content = (run_dir / "files" / value["path"]).read_text(encoding="utf-8")
    if value["_type"] not in ("table-file", "incremental-table-file"):
        return content
    table = json.loads(content)
    earlier = len(value.get("previous_increments_paths", ()))
    return {"columns": table["columns"], "data": table["data"], "num_earlier_increments": earlier}


def read_swanlab(run_dir: str | Path) -> dict[int, dict[str, Any]]:
    """{step: {key: value}} of a finished offline run's folder; tables as {"columns", "data"}, texts as str."""
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    run_dir = Path(run_dir)
    history: dict[int, dict[str, Any]] = {}
    for path in run_dir.glob("*.swanlab"):
        reader = DataStoreReader()
        reader.open(path)
        for payload in reader:
            record = Record.FromString(payload)
            if record.HasField("scalar"):
                history.setdefault(record.scalar.step, {})[record.scalar.key] = record.scalar.value.number
            elif record.HasField("media"):
                (item,) = record.media.value.items
                history.setdefault(record.media.step, {})[record.media.key] = _load_media(run_dir, item.filename)
        reader.close()
    return history


def _load_media(run_dir: Path, filename: str) -> Any:
    if filename.endswith(".txt"):
        return (run_dir / "media" / "text" / filename).read_bytes().decode("utf-8")
    table = json.loads((run_dir / "media" / "echarts" / filename).read_text(encoding="utf-8"))
    columns = [column["field"] for column in table["colDefs"]]
    return {"columns": columns, "data": [[row[column] for column in columns] for row in table["rowData"]]}


def read_mlflow(uri: str, run_id: str) -> dict[str, Any]:
    """`tables` {step: {"columns", "data"}} from the csv files (all cells str), `latest`, `page`, `tags`, and
    `metrics` {key: {step: value}} of a run."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    run = client.get_run(run_id)
    tables, latest, page = {}, None, None
    for artifact in client.list_artifacts(run_id, "val_samples"):
        content = Path(client.download_artifacts(run_id, artifact.path)).read_bytes().decode("utf-8")
        if artifact.path.endswith("latest.json"):
            latest = json.loads(content)
        elif artifact.path.endswith("page.html"):
            page = content
        else:
            step = int(artifact.path.removeprefix("val_samples/step_").removesuffix(".csv"))
            columns, *data = _read_csv(content)
            tables[step] = {"columns": columns, "data": data}
    metrics = {}
    for key in run.data.metrics:
        history = [(metric.step, metric.value) for metric in client.get_metric_history(run_id, key)]
        metrics[key] = dict(history)
        assert len(metrics[key]) == len(history), f"a step of {key} stands twice"
    return {"tables": tables, "latest": latest, "page": page, "tags": dict(run.data.tags), "metrics": metrics}


def _read_csv(content: str) -> list[list[str]]:
    csv.field_size_limit(2**31 - 1)
    return list(csv.reader(io.StringIO(content, newline="")))


def read_tensorboard(directory: str | Path) -> dict[int, dict[str, Any]]:
    """{step: {tag: value}} of all event files of a folder; tables as {"columns", "data"}, texts as TensorBoard's page
    shows them, through its own conversion."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util import tensor_util

    history: dict[int, dict[str, Any]] = {}
    for path in sorted(Path(directory).glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                content = tensor_util.make_ndarray(value.tensor)
                if value.metadata.plugin_data.plugin_name != "text":
                    shown: Any = content.item()
                elif content.ndim == 2:
                    columns, *data = [[_shown_by_tensorboard(cell) for cell in row] for row in content]
                    shown = {"columns": columns, "data": data}
                else:
                    shown = _shown_by_tensorboard(content.item())
                assert value.tag not in history.setdefault(event.step, {}), f"{value.tag} stands twice"
                history[event.step][value.tag] = shown
    return history


def _shown_by_tensorboard(content: bytes) -> str:
    """The text on TensorBoard's page, which must be that of at most one paragraph."""
    from tensorboard.plugin_util import markdown_to_safe_html

    page = re.fullmatch("(?:<p>(.*)</p>)?", markdown_to_safe_html(content), re.DOTALL)
    assert page is not None
    return _text_of_html(page[1] or "")


def visible(text: str) -> str:
    """Control characters made visible, but for line breaks: as TensorBoard has texts."""
    return "".join(
        char.encode("unicode_escape").decode()
        if char != "\n" and unicodedata.category(char) in ("Cc", "Zl", "Zp")
        else char
        for char in text
    )


def _text_of_html(markup: str) -> str:
    text = re.sub("<br ?/?>\n?", "\n", markup)
    assert "<" not in text, f"markup other than line breaks: {markup[:500]}"
    return html.unescape(text)


def read_trackio(path: str | Path) -> dict[int, dict[str, Any]]:
    """{step: {key: value}} of a project's database; tables, and the traces of a key, as {"columns", "data"}."""
    history: dict[int, dict[str, Any]] = {}
    rows: dict[tuple[int, str], list[dict[str, Any]]] = {}
    database = sqlite3.connect(path)
    for step, values in database.execute("SELECT step, metrics FROM metrics ORDER BY id"):
        for key, value in json.loads(values).items():
            if isinstance(value, dict) and value["_type"] == "trackio.table":
                rows.setdefault((step, key), []).extend(value["_value"])
            else:
                history.setdefault(step, {})[key] = value
    if database.execute("SELECT 1 FROM sqlite_master WHERE name = 'traces'").fetchone():
        query = "SELECT step, key, messages, metadata FROM traces ORDER BY step, trace_index"
        for step, key, messages, metadata in database.execute(query):
            (prompt, answer) = json.loads(messages)
            assert (prompt["role"], answer["role"]) == ("user", "assistant")
            texts = {"prompt_text": prompt["content"], "generation": answer["content"]}
            rows.setdefault((step, key), []).append(texts | json.loads(metadata))
    database.close()
    for (step, key), of_key in rows.items():
        columns = list(of_key[0])
        table = {"columns": columns, "data": [[row[column] for column in columns] for row in of_key]}
        history.setdefault(step, {})[key] = table
    return history


def read_clearml(path: str | Path, num_bytes_before: int = 0) -> dict[int, dict[tuple[str, str], Any]]:
    """{step: {(title, series): value}} of an offline task's `metrics.jsonl`, from a byte on; tables as {"columns",
    "data"}, their texts as Plotly shows them."""
    history: dict[int, dict[tuple[str, str], Any]] = {}
    for line in Path(path).read_bytes()[num_bytes_before:].decode().split("\n"):
        for event in json.loads(line) if line else ():
            value = event.get("value")
            if event["type"] == "plot":
                (table,) = json.loads(event["plot_str"])["data"]
                columns = [_text_of_html(column) for column in table["header"]["values"]]
                rows = zip(*table["cells"]["values"], strict=True)
                data = [[_text_of_html(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
                value = {"columns": columns, "data": data}
            history.setdefault(event["iter"], {})[event["metric"], event["variant"]] = value
    return history


def read_verl_file(path: str | Path) -> dict[int, dict[str, float]]:
    """{step: {key: number}} of the lines of verl's `file` logger, of which a step may have several."""
    history: dict[int, dict[str, float]] = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        history.setdefault(record["step"], {}).update(record["data"])
    return history


def read_jsonl(directory: str | Path) -> dict[int, list[dict[str, Any]]]:
    """{step: records} of a `generations` folder."""
    files = {int(path.stem.removeprefix("step_")): path for path in Path(directory).glob("step_*.jsonl")}
    return {
        step: [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        for step, path in files.items()
    }
