// SPDX-License-Identifier: Apache-2.0

package headscale

// configTemplate is the configuration of Headscale. Its arguments are the URL of
// the server, the address it listens on, and the domain of the nodes' names.
//
// Nothing in it leaves the machine: no update check, no DERP map to fetch, no
// name servers. Without TLS there is no gRPC listener either; its address is
// still given, as the default is every interface. Headscale collects changes for
// up to a second, which is meant for tailnets of thousands (tuning).
const configTemplate = `server_url: %s
listen_addr: %s
metrics_listen_addr: ""
grpc_listen_addr: 127.0.0.1:0
grpc_allow_insecure: false
disable_check_updates: true
unix_socket: headscale.sock
unix_socket_permission: "0700"
noise:
  private_key_path: noise.key
prefixes:
  v4: 100.64.0.0/10
  v6: fd7a:115c:a1e0::/48
  allocation: sequential
derp:
  server:
    enabled: false
  urls: []
  paths:
    - ` + derpFile + `
  auto_update_enabled: false
database:
  type: sqlite
  sqlite:
    path: headscale.sqlite
    write_ahead_log: true
dns:
  magic_dns: true
  base_domain: %s
  override_local_dns: false
  nameservers:
    global: []
policy:
  mode: file
  path: ` + policyFile + `
log:
  level: info
  format: text
logtail:
  enabled: false
tuning:
  batch_change_delay: 20ms
  node_store_batch_timeout: 10ms
auto_update:
  enabled: false
`
