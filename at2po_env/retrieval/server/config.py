"""What a retrieval server takes, and where it listens."""

import ipaddress

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from at2po_env.errors import ConfigError


class ServerConfig(BaseModel):
    """Limits and addresses; every request beyond a limit is refused with the limit in the message."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", description="address to listen on; others than loopback need a token")
    port: int = Field(8000, ge=0, le=65535, description="0 takes any free port")
    token: SecretStr | None = Field(None, description="bearer token that requests must carry")
    max_body_bytes: int = Field(4 * 2**20, ge=1, description="largest request body")
    max_queries: int = Field(512, ge=1, description="queries of one request")
    max_query_chars: int = Field(8192, ge=1, description="characters of one query")
    max_topk: int = Field(100, ge=1, description="passages of one query")
    max_batch: int = Field(256, ge=1, description="queries searched together")
    max_wait_ms: float = Field(0.0, ge=0, description="how long an idle server waits for company")
    max_waiting: int = Field(8192, ge=1, description="queries that may wait before new ones are refused")
    workers: int = Field(1, ge=1, description="searches at the same time, in each process")
    processes: int = Field(1, ge=1, description="processes that answer; `serve_processes` starts them")
    timeout_s: float = Field(60.0, gt=0, description="seconds from a request to its answer")
    drain_s: float = Field(30.0, gt=0, description="seconds that a stop waits for requests already taken")

    def check_address(self) -> None:
        """Refuse to listen beyond this machine without a token.

        Raises:
            ConfigError: the host is not loopback and there is no token.
        """
        if self.token is None and not _is_loopback(self.host):
            raise ConfigError(
                f"host {self.host!r} can be reached from other machines, and there is no token. Fix: give "
                "--token (or AT2PO_RETRIEVER_TOKEN), or listen on 127.0.0.1."
            )
        if self.token is not None and not self.token.get_secret_value():
            raise ConfigError("the token is empty. Fix: give one of some length, or none.")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
