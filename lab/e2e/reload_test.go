// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

// portReloaded is the port of a site that has a different version in each config.
const portReloaded = "8010"

func withVersion(l *lab.Lab, appOptions, version string) string {
	return sitesWith(l, appOptions) + fmt.Sprintf(`http://:%s {
	bind tailscale/%s
	tailscale_impersonate
	header X-Version %s
	reverse_proxy %s
}
`, portReloaded, lab.ProxyName, version, plain.addr)
}

func TestReload_LosesNoRequestAndNoIdentity(t *testing.T) {
	defer firstConfig(t)
	for i := range 5 {
		version := fmt.Sprint("v", i)
		if err := theLab.Caddy.Load(withVersion(theLab, "", version)); err != nil {
			t.Fatal(err)
		}
		for range 5 {
			plain.take()
			resp := send(t, "bob", portReloaded, get("/api"))
			if got := resp.Header.Get("X-Version"); resp.StatusCode != http.StatusOK || got != version {
				t.Fatalf("after reload %d: %s from config %q: %s; want 200 from config %q", i, resp.Status, got, resp.body, version)
			}
			wantOnlyBob(t, plain.take(), "")
		}
	}
}

// A closed listener handle of caddy-tailscale accepts one more connection, for a
// config that has been replaced. Go's server answers it over HTTP/2 and closes it
// unanswered over HTTP/1.1. In neither case may the handler, which has been cleaned
// up already, forward a request with an identity other than bob's.
func TestReload_ConnectionAcceptedByOldConfigKeepsIdentity(t *testing.T) {
	// Old handles wait at every port of every site, not only at those used here.
	// They must not affect other tests.
	defer func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := theLab.Caddy.Restart(ctx, sites(theLab)); err != nil {
			t.Fatalf("restarting Caddy: %v", err)
		}
		eventually(t, "bob reaches the restarted node", func() error {
			conn, err := theLab.Callers["bob"].Dial(ctx, "tcp", lab.ProxyName+":"+portHTTPTransport)
			if err != nil {
				return err
			}
			return conn.Close()
		})
	}()
	if err := theLab.Caddy.Load(withVersion(theLab, "linger_on_close", "first")); err != nil {
		t.Fatal(err)
	}
	bob := theLab.Callers["bob"].Server
	unanswered, old := 0, 0
	for i := range 5 {
		version := fmt.Sprint("v", i)
		if err := theLab.Caddy.Load(withVersion(theLab, "linger_on_close", version)); err != nil {
			t.Fatal(err)
		}
		answered := 0
		for range 4 {
			plain.take()
			resp, err := trySend(t, bob, lab.ProxyName+":"+portReloaded, get("/api"))
			if err != nil {
				unanswered++
				if requests := plain.take(); len(requests) > 0 {
					t.Errorf("%d requests arrived over a connection that was closed without an answer", len(requests))
				}
				continue
			}
			answered++
			if resp.StatusCode != http.StatusOK {
				t.Errorf("after reload %d: %s %s; want 200", i, resp.Status, resp.body)
			}
			wantOnlyBob(t, plain.take(), "")
			if resp.Header.Get("X-Version") != version {
				old++
			}

			plain.take()
			if status := sendHTTP2(t, "bob", portHTTPTransportTLS); status != http.StatusOK {
				t.Errorf("after reload %d, over HTTP/2: %d; want 200", i, status)
			}
			wantOnlyBob(t, plain.take(), "")
		}
		if answered < 2 {
			t.Errorf("after reload %d, %d of 4 connections were answered; want all but one or two", i, answered)
		}
	}
	t.Logf("over HTTP/1.1, %d connections were closed unanswered, and an old config answered %d", unanswered, old)
	if unanswered+old == 0 {
		t.Error("no old config accepted a connection; want at least one")
	}
}

// firstConfig restores the config that all tests start with.
func firstConfig(t *testing.T) {
	t.Helper()
	if err := theLab.Caddy.Load(sites(theLab)); err != nil {
		t.Errorf("restoring the first config: %v", err)
	}
}

func TestReload_FollowedLogContinues(t *testing.T) {
	lines := follow(t, "bob", "logs", "-f", lab.Pod)
	if line := <-lines; !strings.HasPrefix(line, "line ") {
		t.Fatalf("kubectl logs -f printed %q", line)
	}
	if err := theLab.Caddy.Load(withVersion(theLab, "", "other")); err != nil {
		t.Fatal(err)
	}
	defer firstConfig(t)
	for range 3 {
		if line := <-lines; !strings.HasPrefix(line, "line ") {
			t.Fatalf("after a reload, kubectl logs -f printed %q", line)
		}
	}
}
