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
