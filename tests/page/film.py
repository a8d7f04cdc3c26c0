"""Makes web/readme.webp, the moving picture in the README: a spoken question about what the camera sees, and its answer.

python -m tests.page.film
"""

from __future__ import annotations

import asyncio
import io
import itertools
import tempfile
import time
from pathlib import Path

from PIL import Image

from tests.test_page import ROOT, Server, recordings, visiting

SIZE = {"width": 1100, "height": 780}
SHORTEST, LAST = 140, 4000  # milliseconds between two frames, and that the last one stays
BEGUN = "() => ['listening', 'hearing'].includes(document.body.dataset.state)"
OVER = """() => document.querySelector('li.agent .times') && !document.querySelector('.coming')
  && document.querySelector('.seen .mark') && document.querySelector('li.user .text:not(.awaited)')
  && document.body.dataset.state === 'listening'"""


async def film() -> list[tuple[bytes, float]]:
    """PNGs, each with the second at which it was taken."""
    server, taken = Server(), list[tuple[bytes, float]]()
    try:
        with tempfile.TemporaryDirectory() as folder:
            media = recordings(Path(folder))
            async with visiting(server, media, viewport=SIZE, color_scheme="light") as visit:
                await visit.until("() => !document.querySelector('#suggestions').hidden")
                await visit.page.click("#start")
                await visit.until(BEGUN)
                over = False
                while not over:
                    over = bool(await visit.page.evaluate(OVER))
                    begun = time.monotonic()
                    taken.append((await visit.page.screenshot(), begun))
                    await asyncio.sleep(max(0.0, SHORTEST / 1000 - (time.monotonic() - begun)))
    finally:
        server.stop()
    return taken


def main() -> None:
    taken = asyncio.run(film())
    pictures = [Image.open(io.BytesIO(png)).convert("RGB") for png, _ in taken]
    times = [at for _, at in taken]
    lengths = [round((after - at) * 1000) for at, after in itertools.pairwise(times)] + [LAST]
    path = ROOT / "web/readme.webp"
    how = {"save_all": True, "append_images": pictures[1:], "duration": lengths, "loop": 0, "quality": 72, "method": 6}
    pictures[0].save(path, **how)
    print(f"{path}: {len(pictures)} frames, {sum(lengths) / 1000:.1f} s, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
