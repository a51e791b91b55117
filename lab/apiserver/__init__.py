"""A double of the Kubernetes API server: enough of its real behaviour to test against, and faults on command.

As a library on the test's own event loop (`ApiServer`), on a thread of its own (`run_in_thread`), or as a program
(`python -m lab.apiserver --listen 127.0.0.1:0 --control 127.0.0.1:0`). tests/kube/test_apiserver_contract.py holds what
it has in common with a real one.
"""

from lab.apiserver.faults import Fault
from lab.apiserver.objects import Cluster, Refusal
from lab.apiserver.server import ApiServer, RequestRecord
from lab.apiserver.thread import ServerThread, run_in_thread

__all__ = ["ApiServer", "Cluster", "Fault", "Refusal", "RequestRecord", "ServerThread", "run_in_thread"]
