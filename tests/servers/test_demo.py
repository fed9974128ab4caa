"""The demo server: what its model makes of a request."""

from __future__ import annotations

from running import Job


def test_the_demo_reads_messages_made_of_parts(job: Job) -> None:
    text = "Rivers rise in spring. Snow melts in spring. The mill stands still."
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    parts = [{"type": "text", "text": "Summarize."}, picture, {"type": "text", "text": text}]
    job.input([{"id": "parts", "text": [{"role": "user", "content": parts}]}])

    output = job.succeed(base_url=None, server="demo", plugin="prompt")

    assert "Rivers rise in spring." in output.rows()[0]["rollout_results"][0]["text"]


def test_a_demo_gives_way_to_the_first_files_with_all_their_columns(job: Job) -> None:
    demo = {"base_url": None, "plugin": None, "output": None}
    assert job(max_documents=3, **demo).rc == 0
    (job.folder / "rows.csv").write_text("title,text\nThe well,A well is deep. It has water.\n")

    finished = job(input="rows.csv", **demo)

    assert finished.rc == 0, finished
    assert "output/demo holds a demo with other options" in finished.stderr
    assert job.output_of(output="output/demo").rows()[0]["title"] == "The well"
    (job.folder / "rows.jsonl").write_text('{"name": "x", "text": "A lake is wide. It has water."}\n')
    assert job(input="rows.jsonl", **demo).rc == 0
    assert job.output_of(output="output/demo").rows()[0]["name"] == "x"


def test_a_real_server_does_not_write_where_the_demo_does(job: Job) -> None:
    real = job(plugin=None, output=None, max_documents=2)
    assert real.rc == 0, real
    assert len(job.output_of(output="output/summarize").rows()) == 2
    assert job(plugin=None, output=None, base_url=None, max_documents=2).rc == 0
    assert len(job.output_of(output="output/demo").rows()) == 2
