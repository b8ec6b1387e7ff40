import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for `import live`

from live import address, client, running, sampler  # noqa: E402, F401
