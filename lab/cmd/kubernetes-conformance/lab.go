// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/node"
)

// caller is who the tests are through the plugin: the examples' policy file grants
// system:masters.
const caller = "alice"

// administrator is who the tests are directly.
const administrator = "lab-admin"

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

// start starts a lab whose node has the images in a file.
func start(ctx context.Context, root, dir, images string) (_ *target, err error) {
	if err := node.Unavailable(); err != nil {
		return nil, err
	}
	t := &target{direct: filepath.Join(dir, "directly.kubeconfig"), through: filepath.Join(dir, "through-the-plugin.kubeconfig")}
	t.lab, err = lab.Start(ctx, lab.Config{
		Dir:      dir,
		Examples: filepath.Join(root, "examples"),
		RealNode: true,
		Callers:  []lab.CallerSpec{{Name: caller, Login: caller + "@example.com"}},
		// The caller is only there later, but the site needs the address now.
		Caddyfile: func(l *lab.Lab) string { return caddyfile(l, l.Cluster.Node().Host().String()) },
		Progress:  os.Stdout,
	})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.stop())
		}
	}()
	if err := t.lab.Cluster.Node().Import(ctx, images); err != nil {
		return nil, err
	}
	if err := os.Remove(images); err != nil {
		return nil, err
	}
	if err := t.lab.Cluster.Apply(ctx, []byte(actAs)); err != nil {
		return nil, err
	}
	if err := t.lab.Cluster.AdminKubeconfig(t.direct); err != nil {
		return nil, err
	}
	// Only the node and its pods reach that address, and this machine. Loopback would do as
	// well, but a test of kubectl skips itself there.
	t.in, err = forward(t.lab.Cluster.Node().Host().String(), func(ctx context.Context) (net.Conn, error) {
		return t.lab.Callers[caller].Dial(ctx, "tcp", lab.ProxyName+"."+lab.Domain+":443")
	})
	if err != nil {
		return nil, err
	}
	if err := writeKubeconfig(t.lab, t.through, t.in.url()); err != nil {
		return nil, err
	}
	// A comparison of two ways that are the same would say nothing.
	return t, errors.Join(isUser(ctx, t.direct, administrator), isUser(ctx, t.through, caller+"@example.com"))
}

// isUser returns an error if the API server does not see the user of a kubeconfig as user.
func isUser(ctx context.Context, kubeconfig, user string) error {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	review, err := client.AuthenticationV1().SelfSubjectReviews().Create(ctx, &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{})
	if err != nil {
		return fmt.Errorf("%s: %w", kubeconfig, err)
	}
	info := review.Status.UserInfo
	if info.Username != user || !slices.Contains(info.Groups, "system:masters") {
		return fmt.Errorf("%s: the API server sees the user %s with the groups %q; want %s with system:masters", kubeconfig, info.Username, info.Groups, user)
	}
	return nil
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
https://%[1]s.%[2]s, https://%[3]s {
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
