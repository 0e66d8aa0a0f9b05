// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/netns"
)

// The proxies that are compared. With direct, clients call the API server without a
// proxy.
const (
	bare     = "bare reverse_proxy"
	plugin   = "this plugin"
	official = "Tailscale's proxy"
	direct   = "no proxy"
)

// nodeNames are the names of the proxies' tailnet nodes.
var nodeNames = map[string]string{bare: "bare", plugin: "plugin", official: "official"}

// What clients request. The caller is an administrator.
const (
	small     = "/api/v1/namespaces/default/configmaps/small" // 2 KB
	smallSize = 2 << 10
	large     = "/api/v1/namespaces/large/configmaps" // 100 objects of 50 KB
	watch     = "/api/v1/namespaces/default/configmaps?watch=1&fieldSelector=metadata.name%3Dsmall&resourceVersion="
)

// bench is the lab in which proxies are measured.
type bench struct {
	options
	root string
	lab  *lab.Lab
	// apiServer is the real API server, answers a stand-in for it.
	apiServer, answers *upstream
	// version is a resourceVersion after which nothing has changed.
	version string
}

func newBench(ctx context.Context, o options, root string) (_ *bench, err error) {
	if err := netns.SetUp(); err != nil {
		return nil, fmt.Errorf("setting up the network namespace: %w", err)
	}
	b := &bench{options: o, root: root}
	b.lab, err = lab.Start(ctx, lab.Config{
		Dir:      o.dir,
		Examples: filepath.Join(root, "examples"),
		Callers:  []lab.CallerSpec{{Name: "alice", Login: "alice@example.com"}},
		Progress: os.Stdout,
	})
	if err != nil {
		return nil, err
	}
	if err := b.fill(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("filling the cluster: %w", err), b.stop())
	}
	if b.answers, err = startAnswers(o.dir); err != nil {
		return nil, errors.Join(err, b.stop())
	}
	return b, nil
}

func (b *bench) stop() error {
	var err error
	if b.answers != nil {
		err = b.answers.stop()
	}
	return errors.Join(err, b.lab.Stop())
}

// fill creates the objects that clients request.
func (b *bench) fill(ctx context.Context) error {
	client, err := kubernetes.NewForConfig(b.lab.Cluster.Admin())
	if err != nil {
		return err
	}
	if err := b.lab.Cluster.Apply(ctx, []byte(`
apiVersion: v1
kind: Namespace
metadata: {name: large}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: bare, namespace: default}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: bare}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: cluster-admin}
subjects: [{kind: ServiceAccount, name: bare, namespace: default}]
`)); err != nil {
		return err
	}
	// The bare proxy does not impersonate, so it uses the token of an account that
	// may do everything. The others use the account that may impersonate.
	token, err := b.lab.Cluster.ServiceAccountToken(ctx, "default", "bare", 12*time.Hour)
	if err != nil {
		return err
	}
	b.apiServer = &upstream{Host: b.lab.Cluster.Host(), CA: string(b.lab.Cluster.CA()), Token: token, kubeconfig: b.lab.Kubeconfig()}
	object := func(namespace, name string, size int) (*corev1.ConfigMap, error) {
		return client.CoreV1().ConfigMaps(namespace).Create(ctx, &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{Name: name},
			Data:       map[string]string{"data": strings.Repeat("x", size)},
		}, metav1.CreateOptions{})
	}
	for i := range 100 {
		if _, err := object("large", fmt.Sprintf("object-%d", i), 50_000); err != nil {
			return err
		}
	}
	created, err := object("default", "small", smallSize-400) // the rest is metadata
	if err != nil {
		return err
	}
	b.version = created.ResourceVersion
	return nil
}

// start starts a proxy to u on the lab's tailnet.
func (b *bench) start(ctx context.Context, kind string, u *upstream) (*proxy, error) {
	key, err := b.lab.Headscale.TagKey(ctx, lab.ProxyTag)
	if err != nil {
		return nil, err
	}
	return b.startOn(kind, u, b.lab.Headscale.URL(), key)
}

// startOn starts a proxy to u on the tailnet of the control server at controlURL.
func (b *bench) startOn(kind string, u *upstream, controlURL, key string) (*proxy, error) {
	name := nodeNames[kind]
	dir, err := os.MkdirTemp(b.dir, name+"-")
	if err != nil {
		return nil, err
	}
	s := spec{Name: name, ControlURL: controlURL, AuthKey: key, Dir: dir, Kubeconfig: u.kubeconfig}
	if b.profile != "" {
		s.Profile = filepath.Join(b.profile, filepath.Base(dir)+".pprof")
	}
	switch kind {
	case plugin:
		s.Caddyfile = b.caddyfile(s, fmt.Sprintf("tailscale_kubernetes {\n\t\tkubeconfig %s\n\t}", u.kubeconfig))
	case bare:
		ca := filepath.Join(dir, "ca.crt")
		if err := os.WriteFile(ca, []byte(u.CA), 0o600); err != nil {
			return nil, err
		}
		s.Caddyfile = b.caddyfile(s, fmt.Sprintf(`reverse_proxy %s {
		header_up Authorization "Bearer %s"
		flush_interval -1
		transport http {
			tls_trust_pool file %s
		}
	}`, u.Host, u.Token, ca))
	}
	return startProxy(kind, s, dir+".log")
}

// caddyfile returns the Caddyfile of a proxy whose sites have the given body, over
// plain HTTP and over TLS with HTTP/2. The global options are those of the examples.
func (b *bench) caddyfile(s spec, body string) string {
	return fmt.Sprintf(`{
	admin off
	persist_config off
	skip_install_trust
	auto_https disable_redirects
	storage file_system %[1]s/caddy
	log {
		output discard
	}
	tailscale {
		control_url %[2]s
		auth_key %[3]s
		state_dir %[1]s/nodes
	}
	servers {
		protocols h1 h2
		max_header_size 32KiB
		timeouts {
			write_idle 1h
		}
	}
}
http://:80, https://%[4]s.%[5]s {
	bind tailscale/%[4]s
	tls internal
	%[6]s
}
`, s.Dir, s.ControlURL, s.AuthKey, s.Name, lab.Domain, body)
}

// startAll starts one proxy of each kind to u. stop stops all of them.
func (b *bench) startAll(ctx context.Context, u *upstream) (proxies []*proxy, stop func() error, err error) {
	stop = func() error {
		var errs []error
		for _, p := range proxies {
			errs = append(errs, p.stop())
		}
		return errors.Join(errs...)
	}
	for _, kind := range []string{bare, plugin, official} {
		p, err := b.start(ctx, kind, u)
		if err != nil {
			return nil, nil, errors.Join(err, stop())
		}
		proxies = append(proxies, p)
	}
	return proxies, stop, nil
}
