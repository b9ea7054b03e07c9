"""Run the app on this machine: python run.py simulation|deployment [key=value ...].

`simulation` is Flower's own, by Ray; `deployment` is a SuperLink with four SuperNodes on loopback.
What is started here is stopped again, by its process id. `key=value` goes to the run's
configuration, such as `variant="private"`. Keys are made where VITGUARD_KEYS names none.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.request import urlopen

APP = Path(__file__).resolve().parent
CLIENTS, PORT = 4, int(os.environ.get("FLOWER_PORT", "39471"))
LINK = f"127.0.0.1:{PORT}"


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of all processes: keys, Flower's home, and where its programs are."""
    own = dict(os.environ)
    own["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{own['PATH']}"
    own |= {
        "FLWR_HOME": str(folder),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    if "VITGUARD_KEYS" not in own:
        keys = folder / "keys"
        keys.mkdir()
        own |= {"VITGUARD_KEYS": str(keys), "VITGUARD_PASSPHRASE": os.urandom(16).hex()}
        subprocess.run([sys.executable, APP / "make_keys.py", keys], env=own, check=True)
    settings = f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{LINK}"\n'
    settings += f"insecure = true\noptions.num-supernodes = {CLIENTS}\n"
    (folder / "config.toml").write_text(settings)
    return own


def until_healthy(link: subprocess.Popen) -> None:
    """Wait until the SuperLink answers."""
    while link.poll() is None:
        try:
            with urlopen(f"http://{LINK}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise SystemExit("The SuperLink ended before it answered.")


def stop(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    with contextlib.suppress(ProcessLookupError):  # none is left
        os.killpg(process.pid, signal.SIGKILL)
    print(f"stopped process {process.pid}", flush=True)


def main(mode: str, *settings: str) -> int:
    """Start what the mode needs, run the app, and stop what was started."""
    if mode not in ("simulation", "deployment"):
        raise SystemExit(__doc__)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    started: list[subprocess.Popen] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        own = environment(folder)

        def start(log: str, *command: str) -> subprocess.Popen:
            with (folder / log).open("w") as out:  # a group of its own: it starts others in turn
                process = subprocess.Popen(
                    command, env=own, stdout=out, stderr=out, start_new_session=True
                )
            started.append(process)
            print(f"started {command[0]} as process {started[-1].pid}", flush=True)
            return started[-1]

        try:
            alone = ["--simulation"] if mode == "simulation" else []
            link = start(
                "superlink.log", "flower-superlink", "--insecure", "--port", str(PORT),
                "--disable-runtime-dependency-installation", *alone,
            )  # fmt: skip
            until_healthy(link)
            for i in range(0 if alone else CLIENTS):
                start(
                    f"supernode-{i}.log", "flower-supernode", "--insecure", "--superlink", LINK,
                    "--port", str(PORT + 1 + i),
                    "--node-config", f"partition-id={i} num-partitions={CLIENTS}",
                )  # fmt: skip
            chosen = [part for s in settings for part in ("--run-config", s)]
            run = ["flwr", "run", str(APP), "here", "--stream", *chosen]
            return subprocess.run(run, env=own, check=False).returncode
        finally:
            for again in (signal.SIGINT, signal.SIGTERM):  # a second Ctrl-C leaves nothing behind
                signal.signal(again, signal.SIG_IGN)
            for process in reversed(started):
                stop(process)
            if os.environ.get("FLOWER_LOGS"):
                for log in folder.glob("*.log"):
                    print(f"--- {log.name}\n{log.read_text()}")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:] or ["help"]))
