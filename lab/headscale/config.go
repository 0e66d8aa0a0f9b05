// SPDX-License-Identifier: Apache-2.0

package headscale

// configTemplate is Headscale's configuration. Its arguments are the server's URL,
// the address it listens on, and the domain of node names.
//
// It keeps everything on this machine: no update check, no DERP map to fetch, no
// name servers. Without TLS there is no gRPC listener, but its address is still set,
// as the default is every interface. By default Headscale collects changes for up to
// a second, which suits tailnets of thousands of nodes; tuning shortens that.
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
  extra_records_path: ` + recordsFile + `
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
