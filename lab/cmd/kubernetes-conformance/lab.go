// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

// caller is who the tests are through the plugin: the examples' policy file grants
// system:masters.
const caller = "alice"

// actAs lets the proxy act as whomever its callers may act as. The examples name each group and
// field, but the tests make up theirs.
const actAs = `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: kubernetes-conformance-act-as}
rules:
- apiGroups: [""]
  resources: [users, groups, serviceaccounts]
  verbs: [impersonate]
- apiGroups: [authentication.k8s.io]
  resources: ["*"]
  verbs: [impersonate]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: kubernetes-conformance-act-as}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: kubernetes-conformance-act-as}
subjects:
- {kind: ServiceAccount, namespace: tailscale-impersonate, name: proxy}
`

// target is a lab that the tests can run against.
type target struct {
	lab *lab.Lab
	in  *forwarder
	// direct is the kubeconfig of an administrator, and through that of the caller.
	direct, through string
}

// stop stops the lab.
func (t *target) stop() error {
	var errs []error
	if t.in != nil {
		errs = append(errs, t.in.close())
	}
	return errors.Join(append(errs, t.lab.Stop())...)
}

// caddyfile returns the configuration of the lab's Caddy. The tests' own WebSocket client knows
// no proxy and no other name than that of the address that it connects to. So the site also has
// that address, which is the forwarder's.
func caddyfile(l *lab.Lab, address string) string {
	return l.Globals(l.ProxyKey(), "default_sni "+address) + fmt.Sprintf(`
https://%s.%s, https://%s {
	bind tailscale/%[1]s
	tls internal
	tailscale_kubernetes {
		kubeconfig %[4]s
		client_impersonation authorize
		stream_close_delay 1m
	}
}
`, lab.ProxyName, lab.Domain, address, l.Kubeconfig())
}

// writeKubeconfig writes the kubeconfig of the caller.
func writeKubeconfig(l *lab.Lab, path, server string) error {
	ca, err := l.Caddy.CA()
	if err != nil {
		return err
	}
	return clientcmd.WriteToFile(api.Config{
		Clusters:       map[string]*api.Cluster{"lab": {Server: server, CertificateAuthorityData: ca}},
		AuthInfos:      map[string]*api.AuthInfo{caller: {Token: "unused"}}, // the proxy removes it
		Contexts:       map[string]*api.Context{"lab": {Cluster: "lab", AuthInfo: caller}},
		CurrentContext: "lab",
	}, path)
}
