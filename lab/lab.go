// SPDX-License-Identifier: Apache-2.0

// Package lab runs everything that a request passes between a tailnet device and a
// Kubernetes API server, with real components: a control server with a policy file
// and a DERP relay (Headscale), etcd and kube-apiserver, a node, Caddy with the plugin
// on tailnet listeners, and one tailnet node per caller.
//
// One component is not real: package standin replaces caddy-tailscale. The node is
// real (see package node) where that is possible and asked for; elsewhere, pods are
// processes of package kubelet.
package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/rbac"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/cluster"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/headscale"
)

// Names in the lab.
const (
	// Domain is the domain of the tailnet.
	Domain = "tailnet.example"
	// ProxyName is the hostname of the tailnet node that Caddy listens on.
	ProxyName = "k8s"
	// ProxyTag is the tag of that node, which is the destination of the policy's grants.
	ProxyTag = "tag:k8s"
	// Pod is the pod that runs in the namespace default.
	Pod = "web"
	// EchoPort is the port on which this pod, if it is on a real node, sends back what
	// it receives.
	EchoPort = "7"
	// impersonator is the service account that the proxy uses, from
	// examples/kubernetes/10-impersonator.yaml.
	impersonatorNamespace, impersonatorName = "tailscale-impersonate", "proxy"
)

// CallerSpec describes a device that calls the API server.
type CallerSpec struct {
	// Name is the device's hostname.
	Name string
	// Login is the login name of the device's user, empty for a tagged device.
	Login string
	// Tags are the tags of a tagged device.
	Tags []string
}

// Config says what to start.
type Config struct {
	// Dir is the folder for all files. It must exist.
	Dir string
	// Examples is the project's examples folder, whose policy file and manifests the
	// lab uses.
	Examples string
	// Caddyfile returns the Caddyfile for the lab's Caddy. If nil, the lab has no
	// Caddy.
	Caddyfile func(*Lab) string
	// Policy changes the policy file of the examples. Default: no change.
	Policy func([]byte) ([]byte, error)
	// GroupPrefixes are the group prefixes that sites of the Caddyfile use.
	GroupPrefixes []string
	// RealNode asks for a real node, with kubelet and containerd, rather than pods that
	// are processes of this machine. See [node.Unavailable] for where it cannot run.
	RealNode bool
	// PodsJoin lets pods on the real node join the tailnet: its control server and its
	// relay listen where they reach them.
	PodsJoin bool
	// Shared is a folder of this machine that the lab's pods see too, under the same
	// path.
	Shared string
	// Constrained gives the proxy only rights of constrained impersonation.
	Constrained bool
	// Callers are the devices that call the API server.
	Callers []CallerSpec
	// Progress receives a line for each step.
	Progress io.Writer
}

// Lab is a running lab.
type Lab struct {
	Dir       string
	Headscale *headscale.Server
	Cluster   *cluster.Cluster
	Caddy     *Caddy
	Callers   map[string]*Caller
	// Policy is the tailnet's initial policy file.
	Policy []byte

	progress io.Writer
	proxyKey string
	prefixes []string
	mu       sync.Mutex // held while a line of progress is written
}

// Start starts what cfg describes. If a component fails, Start stops all of them and
// returns an error that names the component, the reason and its log.
func Start(ctx context.Context, cfg Config) (_ *Lab, err error) {
	// The lab must not contact Tailscale's log servers or update servers.
	if err := os.Setenv("TS_NO_LOGS_NO_SUPPORT", "true"); err != nil {
		return nil, err
	}
	l := &Lab{Dir: cfg.Dir, Callers: make(map[string]*Caller), progress: cfg.Progress, prefixes: cfg.GroupPrefixes}
	if l.progress == nil {
		l.progress = io.Discard
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Stop())
		}
	}()

	if l.Policy, err = os.ReadFile(filepath.Join(cfg.Examples, "policy.hujson")); err != nil {
		return nil, fmt.Errorf("reading the policy file: %w", err)
	}
	if cfg.Policy != nil {
		if l.Policy, err = cfg.Policy(l.Policy); err != nil {
			return nil, fmt.Errorf("changing the policy file: %w", err)
		}
	}
	if err := l.startBoth(ctx, cfg); err != nil {
		return nil, err
	}
	if cfg.Caddyfile != nil {
		if err := l.step("Caddy on tailnet node "+ProxyName, func() (err error) {
			l.Caddy, err = startCaddy(ctx, l, cfg.Caddyfile(l))
			return err
		}); err != nil {
			return nil, err
		}
	}

	joins := make([]func() error, len(cfg.Callers))
	for i, spec := range cfg.Callers {
		joins[i] = func() error {
			return l.step("caller "+spec.Name, func() error {
				_, err := l.Join(ctx, spec)
				return err
			})
		}
	}
	return l, together(joins...)
}

// Stop stops everything and returns all errors.
func (l *Lab) Stop() error {
	var errs []error
	for _, c := range l.Callers {
		errs = append(errs, c.Stop())
	}
	if l.Caddy != nil {
		errs = append(errs, l.Caddy.Stop())
	}
	if l.Cluster != nil {
		errs = append(errs, l.Cluster.Stop())
	}
	if l.Headscale != nil {
		errs = append(errs, l.Headscale.Stop())
	}
	return errors.Join(errs...)
}

// Log returns the path of the log of the component of that name.
func (l *Lab) Log(part string) string { return filepath.Join(l.Dir, part+".log") }

// startBoth starts the tailnet and the cluster.
func (l *Lab) startBoth(ctx context.Context, cfg Config) error {
	if !cfg.PodsJoin {
		return together(
			func() error { return l.startHeadscale(ctx, netip.Addr{}) },
			func() error { return l.startCluster(ctx, cfg) },
		)
	}
	if !cfg.RealNode {
		return errors.New("pods that are processes cannot join the tailnet: PodsJoin needs RealNode")
	}
	// This machine has the address that pods reach it at once the node is there.
	if err := l.startCluster(ctx, cfg); err != nil {
		return err
	}
	return l.startHeadscale(ctx, l.Cluster.Node().Host())
}

// startHeadscale starts the tailnet, whose servers listen on host.
func (l *Lab) startHeadscale(ctx context.Context, host netip.Addr) error {
	return l.step("Headscale and a DERP relay", func() (err error) {
		l.Headscale, err = headscale.Start(ctx, headscale.Config{
			Dir:        filepath.Join(l.Dir, "headscale"),
			Policy:     l.Policy,
			BaseDomain: Domain,
			Host:       host,
		})
		if err != nil {
			return err
		}
		l.proxyKey, err = l.Headscale.TagKey(ctx, ProxyTag)
		return err
	})
}

func (l *Lab) startCluster(ctx context.Context, cfg Config) error {
	what := "etcd, kube-apiserver and a node whose pods are processes"
	if cfg.RealNode {
		what = "etcd, kube-apiserver and a node with kubelet and containerd"
	}
	return l.step(what, func() (err error) {
		if l.Cluster, err = cluster.Start(ctx, cluster.Config{Dir: filepath.Join(l.Dir, "cluster"), RealNode: cfg.RealNode, Shared: cfg.Shared}); err != nil {
			return err
		}
		for _, name := range []string{"00-namespace.yaml", "10-impersonator.yaml", "11-audit.yaml", "12-act-as.yaml", "30-bindings.yaml"} {
			manifest, err := os.ReadFile(filepath.Join(cfg.Examples, "kubernetes", name))
			if err != nil {
				return err
			}
			if err := l.Cluster.Apply(ctx, manifest); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
		if err := l.LimitProxy(ctx, l.Policy, cfg.Constrained); err != nil {
			return err
		}
		// As a kubelet mounts it into a pod and renews it: the token of the service
		// account that may only impersonate.
		token, err := l.Cluster.ServiceAccountToken(ctx, impersonatorNamespace, impersonatorName, 12*time.Hour)
		if err != nil {
			return err
		}
		if err := os.WriteFile(l.TokenFile(), []byte(token), 0o600); err != nil {
			return err
		}
		if err := l.Cluster.WriteTokenKubeconfig(l.Kubeconfig(), l.TokenFile()); err != nil {
			return err
		}
		if err := l.Cluster.AdminKubeconfig(l.AdminKubeconfig()); err != nil {
			return err
		}
		script := "i=0; while true; do echo line $i; i=$((i+1)); sleep 1; done"
		if cfg.RealNode {
			script = "nc -ll -p " + EchoPort + " -e cat & " + script
		}
		return l.Cluster.RunPod(ctx, "default", Pod, []string{"sh", "-c", script})
	})
}

// LimitProxy lets the proxy impersonate only what a policy file grants, as "caddy
// tailscale-impersonate rbac" prints, with or without constrained impersonation.
func (l *Lab) LimitProxy(ctx context.Context, policy []byte, constrained bool) error {
	for _, prefix := range append([]string{""}, l.prefixes...) {
		options := rbac.Defaults()
		options.Constrained = constrained
		options.Audit = constrained // 11-audit.yaml uses the older verb
		options.GroupPrefix = prefix
		if prefix != "" {
			options.Name += "-" + strings.Trim(prefix, ":")
		}
		manifest, err := rbac.FromPolicy(policy, options)
		if err != nil {
			return fmt.Errorf("the proxy's rights: %w", err)
		}
		if err := l.Cluster.Apply(ctx, manifest); err != nil {
			return fmt.Errorf("the proxy's rights: %w", err)
		}
	}
	return nil
}

// ProxyKey returns the auth key of the proxy's node.
func (l *Lab) ProxyKey() string { return l.proxyKey }

// Kubeconfig returns the path of the kubeconfig that the proxy uses.
func (l *Lab) Kubeconfig() string { return filepath.Join(l.Dir, "proxy.kubeconfig") }

// TokenFile returns the path of the token file in that kubeconfig.
func (l *Lab) TokenFile() string { return filepath.Join(l.Dir, "proxy.token") }

// AdminKubeconfig returns the path of the administrator's kubeconfig, which calls
// the API server directly.
func (l *Lab) AdminKubeconfig() string { return filepath.Join(l.Dir, "admin.kubeconfig") }

// step runs f and reports how long it took.
func (l *Lab) step(what string, f func() error) error {
	start := time.Now()
	err := f()
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		fmt.Fprintf(l.progress, "  failed  %s\n", what)
		return fmt.Errorf("%s: %w", what, err)
	}
	fmt.Fprintf(l.progress, "  %5.1f s  %s\n", time.Since(start).Seconds(), what)
	return nil
}

// together runs all of fs concurrently and returns their errors.
func together(fs ...func() error) error {
	var wg sync.WaitGroup
	errs := make([]error, len(fs))
	for i, f := range fs {
		wg.Go(func() { errs[i] = f() })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// indent returns s with each line indented by a tab.
func indent(s string) string {
	return "\t" + strings.ReplaceAll(strings.TrimSpace(s), "\n", "\n\t")
}
