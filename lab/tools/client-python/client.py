# SPDX-License-Identifier: Apache-2.0

"""What Kubernetes' Python client does in a test of the lab. Prints, as JSON, the results.

Arguments: the server's URL, the address that its name stands for, a CA file, a pod, a port
of it that echoes.
"""

import json
import socket
import sys

import kubernetes
import websocket
from kubernetes import client, watch
from kubernetes.stream import portforward, stream

url, address, ca, pod, port = sys.argv[1:]

# This machine is not on the tailnet: the name stands for an address that forwards there.
lookup = socket.getaddrinfo
host, forward = address.rsplit(":", 1)
socket.getaddrinfo = lambda name, port, *args, **kwargs: lookup(
    *((host, forward) if url.endswith("://" + name) else (name, port)), *args, **kwargs
)

config = client.Configuration()
config.host, config.ssl_ca_cert = url, ca
api = client.CoreV1Api(client.ApiClient(config))

result = {"client": f"kubernetes {kubernetes.__version__}, websocket-client {websocket.__version__}"}
result["list"] = [p.metadata.name for p in api.list_namespaced_pod("default").items]
result["watch"] = next(iter(watch.Watch().stream(api.list_namespaced_pod, "default", timeout_seconds=5)))["type"]

# stream replaces the client's function for requests, so each gets a client of its own.
shell = stream(
    client.CoreV1Api(client.ApiClient(config)).connect_get_namespaced_pod_exec,
    pod, "default", command=["sh", "-c", "read line; echo got $line; exit 3"],
    stdin=True, stdout=True, stderr=True, tty=False, _preload_content=False,
)
shell.write_stdin("hello\n")
shell.run_forever(timeout=20)
result["exec"] = shell.read_stdout()
result["code"] = shell.returncode

forwarded = portforward(
    client.CoreV1Api(client.ApiClient(config)).connect_get_namespaced_pod_portforward, pod, "default", ports=port
)
tunnel = forwarded.socket(int(port))
tunnel.settimeout(20)
tunnel.sendall(b"hello")
result["portforward"] = tunnel.recv(5).decode()
print(json.dumps(result))
