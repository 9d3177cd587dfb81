"""A headless Chromium that tests talk to over two pipes, and a web server as plain as any."""

import base64
import contextlib
import functools
import http.server
import json
import os
import shutil
import subprocess
import threading

import pytest

# Debian's /usr/bin/chromium is a script, which keeps the pipes open for the browser.
NAMES = ("chromium", "chromium-browser", "google-chrome")
PROGRAM = next(filter(None, map(shutil.which, NAMES)), None)
needs_chromium = pytest.mark.skipif(PROGRAM is None, reason="no Chromium: apt-get install chromium")


class Quiet(http.server.SimpleHTTPRequestHandler):
  """The handler of `python -m http.server`, without its log."""

  def log_message(self, *_):
    pass


@contextlib.contextmanager
def served(folder):
  """Serves a folder, and yields the address."""
  handler = functools.partial(Quiet, directory=os.fspath(folder))
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
      yield f"http://127.0.0.1:{server.server_port}"
    finally:
      server.shutdown()


class Browser:
  """A page in Chromium, by the DevTools protocol."""

  def __init__(self, to_browser, from_browser):
    self._out, self._in, self._count, self._session = to_browser, from_browser, 0, None
    target = self.call("Target.createTarget", url="about:blank")["targetId"]
    attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
    self._session = attached["sessionId"]
    self.call("Page.enable")

  def call(self, method, **params):
    """Calls a method of the protocol, and returns its result."""
    self._count += 1
    message = {"id": self._count, "method": method, "params": params}
    if self._session:
      message["sessionId"] = self._session
    self._out.write(json.dumps(message).encode() + b"\0")
    self._out.flush()
    while True:
      answer = self._message()
      if answer.get("id") == self._count:
        assert "error" not in answer, answer
        return answer["result"]

  def _message(self):
    content = bytearray()
    while (byte := self._in.read(1)) != b"\0":
      assert byte, "the browser has ended"
      content += byte
    return json.loads(content)

  def open(self, address, *, width=1000, height=900, scheme="light", phone=False):
    """Opens an address in a window of a size, in a colour scheme."""
    self.call(
      "Emulation.setDeviceMetricsOverride",
      width=width, height=height, deviceScaleFactor=1, mobile=phone,
    )  # fmt: skip
    feature = {"name": "prefers-color-scheme", "value": scheme}
    self.call("Emulation.setEmulatedMedia", features=[feature])
    self.call("Page.navigate", url=address)

  def run(self, script):
    """Returns the value of an expression in the page; waits for a promise."""
    answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
    assert "exceptionDetails" not in answer, answer["exceptionDetails"]
    return answer["result"].get("value")

  def wait(self, condition, seconds=60):
    """Waits until an expression is true."""
    found = self.run(
      f"""new Promise((done) => {{
        const end = performance.now() + {1000 * seconds};
        const look = () => {{
          let found = false;
          try {{ found = Boolean({condition}); }} catch {{}}
          if (found || performance.now() > end) done(found); else setTimeout(look, 50);
        }};
        look();
      }})"""
    )
    assert found, f"{condition} is not true: {self.run('document.body.innerText')}"

  def draw(self, strokes):
    """Draws lines with the mouse on the element #pad, whose corners are (0, 0) and (1, 1)."""
    box = self.run("(({x, y, width}) => [x, y, width])(pad.getBoundingClientRect())")
    for stroke in strokes:
      kinds = ["mousePressed", *["mouseMoved"] * (len(stroke) - 1)]
      for kind, (x, y) in [*zip(kinds, stroke), ("mouseReleased", stroke[-1])]:
        place = {"x": box[0] + x * box[2], "y": box[1] + y * box[2]}
        self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

  def picture(self, path):
    """Writes what the page looks like, down to its end."""
    shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
    path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def browser(profile):
  """Starts Chromium with a new profile in a folder, and yields a `Browser`."""
  down, up = os.pipe(), os.pipe()
  flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe")
  # The browser reads its file 3 and writes to its file 4.
  shell = f'exec 3<&{down[0]} 4>&{up[1]}; exec "$@"'
  process = subprocess.Popen(
    ["bash", "-c", shell, "bash", PROGRAM, *flags, f"--user-data-dir={profile}"],
    pass_fds=(down[0], up[1]),
    stderr=subprocess.DEVNULL,
  )
  os.close(down[0])
  os.close(up[1])
  with open(down[1], "wb") as to_browser, open(up[0], "rb") as from_browser:
    try:
      yield Browser(to_browser, from_browser)
    finally:
      process.terminate()
      process.wait(30)
