// SPDX-License-Identifier: Apache-2.0

package app

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// fakeNode is a node whose status a test changes.
type fakeNode struct {
	tailnet.Node
	mu     sync.Mutex
	status tailnet.Status
	err    error
}

func (f *fakeNode) is(status tailnet.Status, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.status, f.err = status, err
}

func newFakeNode(name string, status tailnet.Status) *fakeNode {
	f := &fakeNode{status: status}
	f.Name = name
	f.Status = func(context.Context) (tailnet.Status, error) {
		f.mu.Lock()
		defer f.mu.Unlock()
		return f.status, f.err
	}
	return f
}

var running = tailnet.Status{State: "Running"}

// watching watches nodes, and returns what is logged about them from one call to the next.
// The sites called names need certificates from Tailscale.
func watching(t *testing.T, names []string, all ...*fakeNode) (n *nodes, logged func() []string) {
	t.Helper()
	core, logs := observer.New(zapcore.InfoLevel)
	n = &nodes{logger: zap.New(core), names: names}
	list := make([]*tailnet.Node, len(all))
	for i, node := range all {
		list[i] = &node.Node
	}
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	go n.watch(ctx, list)
	return n, func() (out []string) {
		synctest.Wait()
		for _, entry := range logs.TakeAll() {
			fields := entry.ContextMap()
			out = append(out, fmt.Sprintf("%s: %s: %v", entry.Level, entry.Message, fields["node"]))
		}
		return out
	}
}

const (
	soon    = "warn: the key of a tailnet node expires soon, and callers will time out: k8s"
	expired = "error: the key of a tailnet node has expired, and callers time out: k8s"
	away    = "error: a tailnet node is not connected, and callers time out: k8s"
	back    = "info: a tailnet node is connected again: k8s"
)

func check(t *testing.T, when string, got []string, want ...string) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s, it logs (-want +got):\n%s", when, diff)
	}
}

func TestNodes_ExpiringKeyIsLoggedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		expiry := time.Now().Add(expiryNotice + time.Hour)
		node := newFakeNode("k8s", tailnet.Status{State: "Running", KeyExpiry: expiry})
		n, logged := watching(t, nil, node)
		check(t, "earlier", logged())
		time.Sleep(2 * time.Hour)
		check(t, "a week before", logged(), soon)
		time.Sleep(expiryNotice - time.Hour)
		check(t, "until then", logged())
		if !n.up() {
			t.Error("the node is down before its key expires")
		}
		node.is(tailnet.Status{State: "NeedsLogin", KeyExpiry: expiry}, nil)
		time.Sleep(nodesPeriod)
		check(t, "when it expires", logged(), expired)
		time.Sleep(time.Hour)
		check(t, "later", logged())
		if n.up() {
			t.Error("the node is up although its key has expired")
		}
		node.is(running, nil)
		time.Sleep(nodesPeriod)
		check(t, "when it has another key", logged(), back)
		if !n.up() {
			t.Error("the node is down although it has another key")
		}
		node.is(tailnet.Status{State: "Running", KeyExpiry: time.Now().Add(time.Hour)}, nil)
		time.Sleep(nodesPeriod)
		check(t, "when the other key expires", logged(), soon)
	})
}

// A node that starts is not connected for some seconds.
func TestNodes_DownNodeIsLoggedOnce(t *testing.T) {
	for name, fail := range map[string]func(*fakeNode){
		"needs a login": func(f *fakeNode) { f.is(tailnet.Status{State: "NeedsLogin"}, nil) },
		"no answer":     func(f *fakeNode) { f.is(tailnet.Status{}, errors.New("no LocalAPI")) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				node := newFakeNode("k8s", tailnet.Status{State: "Starting"})
				n, logged := watching(t, nil, node)
				time.Sleep(downPeriod - time.Second)
				check(t, "while it starts", logged())
				if n.up() {
					t.Error("a node that starts is up")
				}
				node.is(running, nil)
				time.Sleep(nodesPeriod)
				check(t, "when it has started", logged())
				fail(node)
				time.Sleep(downPeriod / 2)
				check(t, "at first", logged())
				time.Sleep(time.Hour)
				check(t, "later", logged(), away)
			})
		})
	}
}

// After a restart, the node does not know when its key expired.
func TestNodes_ExpiredKeyIsToldByControlServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, logged := watching(t, nil, newFakeNode("k8s", tailnet.Status{State: "NoState", Health: []string{
			"You are logged out. The last login error was: weird: regen=true but server says NodeKeyExpired: nodekey:00",
		}}))
		check(t, "after a restart", logged(), expired)
	})
}

// Each handler has nodes of its own, and those of two tailnets may have one name.
func TestNodes_WorstOfOneNameCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		expiry := time.Unix(4e9, 0)
		n, logged := watching(t, nil,
			newFakeNode("a", running), newFakeNode("b", tailnet.Status{State: "Running", KeyExpiry: expiry}), newFakeNode("b", running),
			newFakeNode("c", tailnet.Status{State: "Stopped"}), newFakeNode("c", running))
		logged()
		const p = "caddy_tailscale_impersonate_"
		const want = `
			# HELP ` + p + `node_key_expiry_timestamp_seconds When the key of a tailnet node expires, +Inf if never, by the node's name in the config.
			# TYPE ` + p + `node_key_expiry_timestamp_seconds gauge
			` + p + `node_key_expiry_timestamp_seconds{node="a"} +Inf
			` + p + `node_key_expiry_timestamp_seconds{node="b"} 4e+09
			` + p + `node_key_expiry_timestamp_seconds{node="c"} +Inf
			# HELP ` + p + `node_up Whether a tailnet node is connected, by its name in the config.
			# TYPE ` + p + `node_up gauge
			` + p + `node_up{node="a"} 1
			` + p + `node_up{node="b"} 1
			` + p + `node_up{node="c"} 0
		`
		if err := testutil.CollectAndCompare(n, strings.NewReader(want)); err != nil {
			t.Error(err)
		}
	})
}

// A config without handlers has no nodes that could be down.
func TestNodes_NoneAreUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &nodes{logger: zap.NewNop()}
		if n.up() {
			t.Error("nodes that have not been asked are up")
		}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go n.watch(ctx, nil)
		synctest.Wait()
		if !n.up() {
			t.Error("no nodes are down")
		}
	})
}

const certless = "error: sites need certificates from Tailscale, and the tailnet has none, so that TLS handshakes fail: k8s"

func TestNodes_TailnetWithoutCertificatesIsLoggedOnce(t *testing.T) {
	const name = "k8s.example.ts.net"
	for _, tt := range []struct {
		what, node string
		names      []string
		want       []string
	}{
		{"a site has the node's name", name, []string{name}, []string{certless}},
		{"a site has another name of the tailnet", name, []string{"K8S-1.Example.ts.net"}, []string{certless}},
		{"a site has a name of another tailnet", name, []string{"k8s.other.ts.net"}, nil},
		{"no site needs one", name, nil, nil},
		{"the node has no name yet", "", []string{name, "k8s"}, nil},
	} {
		t.Run(tt.what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				node := newFakeNode("k8s", tailnet.Status{State: "Starting", DNSName: tt.node})
				n, logged := watching(t, tt.names, node)
				check(t, "while the node starts", logged())
				up := tailnet.Status{State: "Running", DNSName: tt.node}
				node.is(up, nil)
				time.Sleep(nodesPeriod)
				check(t, "when it has started", logged(), tt.want...)
				time.Sleep(time.Hour)
				check(t, "later", logged())
				with := up
				with.CertDomains = []string{tt.node}
				node.is(with, nil)
				time.Sleep(nodesPeriod)
				check(t, "when the tailnet has certificates", logged())
				node.is(up, nil)
				time.Sleep(nodesPeriod)
				check(t, "when it has none any more", logged(), tt.want...)
				if !n.up() {
					t.Error("the node is down")
				}
			})
		})
	}
}
