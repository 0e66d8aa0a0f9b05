// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

// nodeUp returns the metric node_up of the proxy's node.
func nodeUp(t *testing.T) float64 {
	t.Helper()
	config := caddy.ActiveContext()
	families, err := config.GetMetricsRegistry().Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, family := range families {
		if family.GetName() != "caddy_tailscale_impersonate_node_up" {
			continue
		}
		for _, metric := range family.GetMetric() {
			if metric.GetLabel()[0].GetValue() == lab.ProxyName {
				return metric.GetGauge().GetValue()
			}
		}
	}
	return -1
}

// The proxy's own key expires: its log, the metric and the readiness tell. Nobody else
// does, as callers only time out. The node continues when its key is extended, without a
// restart.
func TestNode_ExpiredKeyIsReported(t *testing.T) {
	defer firstConfig(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	probe := ln.Addr().String()
	if err := ln.Close(); err != nil {
		t.Fatal(err)
	}
	log := tail(t, theLab.Log("caddy"))
	if err := theLab.Caddy.Load(sites(theLab) + fmt.Sprintf("http://%s {\n@down not tailnet_up\nrespond @down 503\nrespond ok\n}\n", probe)); err != nil {
		t.Fatal(err)
	}
	ready := func() bool {
		t.Helper()
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+probe+"/readyz", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		_, _ = io.Copy(io.Discard, resp.Body)
		return resp.StatusCode == http.StatusOK
	}
	lines := ""
	logged := func(message string) {
		t.Helper()
		within(t, time.Minute, "the log says: "+message, func() error {
			lines += strings.Join(log.lines(t), "\n")
			if !strings.Contains(lines, message) {
				return errors.New("no such line")
			}
			return nil
		})
	}
	state := func(up bool) {
		t.Helper()
		want := map[bool]float64{true: 1}[up]
		within(t, time.Minute, fmt.Sprintf("the node is reported as up: %v", up), func() error {
			if got, metric := ready(), nodeUp(t); got != up || metric != want {
				return fmt.Errorf("ready: %v, node_up: %v", got, metric)
			}
			return nil
		})
	}
	state(true)
	t.Cleanup(func() {
		if err := theLab.Headscale.NeverExpireNode(context.Background(), lab.ProxyName); err != nil {
			t.Error(err)
		}
		eventually(t, "callers reach the proxy again", func() error { return listsPods(t, "bob") })
	})

	if err := theLab.Headscale.ExpireNodeAt(t.Context(), lab.ProxyName, time.Now().Add(24*time.Hour)); err != nil {
		t.Fatal(err)
	}
	logged("the key of a tailnet node expires soon")
	state(true)
	if err := theLab.Headscale.ExpireNode(t.Context(), lab.ProxyName); err != nil {
		t.Fatal(err)
	}
	logged("the key of a tailnet node has expired")
	state(false)
	if err := theLab.Headscale.NeverExpireNode(t.Context(), lab.ProxyName); err != nil {
		t.Fatal(err)
	}
	logged("a tailnet node is connected again")
	state(true)
	for _, message := range []string{"expires soon", "has expired"} {
		if n := strings.Count(lines, message); n != 1 {
			t.Errorf("the log says %d times that a key %s; want once", n, message)
		}
	}
}
