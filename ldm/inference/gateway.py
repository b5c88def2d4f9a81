"""What listens for the page's visitors, and ends when the user wishes."""

from typing import Any

import uvicorn

from ldm.inference.serve import Server


class Gateway(uvicorn.Server):
    """Answers visitors until a signal ends it; then what is being made ends, too, so that nobody waits for it."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self.server = server

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.server.close()
        super().handle_exit(sig, frame)
