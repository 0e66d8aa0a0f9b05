// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"tailscale.com/ipn"
	"tailscale.com/tsnet"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/conformance"
)

// docs/faults.md says what callers and operators see of each of these faults.

func TestFaults_RequestsContinueWithoutControlServer(t *testing.T) {
	underLoad(t, func(l *load) {
		if err := theLab.Headscale.Killed(t.Context(), func() { l.wantProgress(t, "bob", "carol") }); err != nil {
			t.Fatal(err)
		}
		l.wantProgress(t, "bob", "carol")
		// The proxy's node is connected to the control server again when it learns of a grant.
		withdraw := grantTo(t, "dave@example.com", masters())
		within(t, time.Minute, "dave may list secrets", func() error {
			_, stderr, err := tryKubectl(t, "dave", "get", "secrets")
			if err != nil {
				return fmt.Errorf("%w: %s", err, stderr)
			}
			return nil
		})
		withdraw()
		l.wantOnlyOK(t, "bob", "carol")
	})
}

// A node that logs in again has a new key, which its peers have to learn.
func TestFaults_ProxyContinuesWithNewKey(t *testing.T) {
	node, err := theLab.Caddy.Node(t.Context(), lab.ProxyName)
	if err != nil {
		t.Fatal(err)
	}
	underLoad(t, func(l *load) {
		before := keyOf(t, node)
		lc, err := node.LocalClient()
		if err != nil {
			t.Fatal(err)
		}
		if err := lc.Start(t.Context(), ipn.Options{AuthKey: theLab.ProxyKey()}); err != nil {
			t.Fatal(err)
		}
		if err := lc.StartLoginInteractive(t.Context()); err != nil {
			t.Fatal(err)
		}
		within(t, time.Minute, "the node has a new key", func() error {
			if after := keyOf(t, node); after == before {
				return errors.New("the key is unchanged")
			}
			return nil
		})
		rekeyed := time.Now()
		l.wantProgress(t, "bob", "carol")
		t.Logf("requests succeeded %.1f s after the node had its new key", time.Since(rekeyed).Seconds())
	})
}

// keyOf returns the key of a tailnet node, or "" if the node does not report it.
func keyOf(t *testing.T, node *tsnet.Server) string {
	t.Helper()
	lc, err := node.LocalClient()
	if err != nil {
		t.Fatal(err)
	}
	status, err := lc.StatusWithoutPeers(t.Context())
	if err != nil || status.Self == nil || status.BackendState != ipn.Running.String() {
		return ""
	}
	return status.Self.PublicKey.String()
}

func TestFaults_ChangedTagsChangeIdentity(t *testing.T) {
	underLoad(t, func(l *load) {
		device := joinForTest(t, lab.CallerSpec{Name: "tagger", Tags: []string{"tag:k8s-readers"}})
		name := "tagger." + lab.Domain
		l.add(t, device, conformance.Identity{User: name, Groups: []string{"tag:k8s-readers"}}, conformance.Identity{User: name, Groups: []string{"ops"}})
		l.wantProgress(t, "tagger")
		log := tail(t, theLab.Log("caddy"))
		watch := startKubectl(t, device.Kubeconfig, nil, "get", "pods", "--watch", "--output-watch-events", "--no-headers")
		watch.want(t, "ADDED")

		if err := theLab.Headscale.SetTags(t.Context(), "tagger", "tag:k8s-ops"); err != nil {
			t.Fatal(err)
		}
		select {
		case <-watch.ended:
		case <-time.After(revokedWithin):
			t.Errorf("the watch of %s is still open after %v", name, revokedWithin)
		}
		wantLogged(t, log, name, "is no longer in group tag:k8s-readers")
		wantIdentity(t, device, name, "ops")
		l.wantProgress(t, "tagger", "bob", "carol")
		l.wantOnlyOK(t, "bob", "carol")
		leave(t, device)
	})
}

// Headscale uses the new name at once, but sends it to nodes only when they connect
// again. Until then the proxy's node knows the caller by the old name.
func TestFaults_RenamedUserChangesIdentity(t *testing.T) {
	underLoad(t, func(l *load) {
		const was, is = "frank@example.com", "frances@example.com"
		grantTo(t, is, "renamed")
		device := joinForTest(t, lab.CallerSpec{Name: "renamed", Login: was})
		l.add(t, device, conformance.Identity{User: was}, conformance.Identity{User: was, Groups: []string{"renamed"}}, conformance.Identity{User: is, Groups: []string{"renamed"}})
		l.wantProgress(t, "renamed")
		if err := theLab.Headscale.RenameUser(t.Context(), was, is); err != nil {
			t.Fatal(err)
		}
		wantIdentity(t, device, was, "renamed")
		log := tail(t, theLab.Log("caddy"))
		open := make(chan int, 1)
		slow := clientOf(t, device, "HTTP/1.1")
		go func() {
			open <- ask(slow, "http://"+lab.ProxyName+":"+portHTTPTransport+"/slow?after=2m")
		}()
		if err := theLab.Headscale.Killed(t.Context(), func() {}); err != nil {
			t.Fatal(err)
		}
		wantIdentity(t, device, is, "renamed")
		select {
		case <-open:
		case <-time.After(revokedWithin):
			t.Errorf("a request of %s is still open %v after the user became %s", was, revokedWithin, is)
		}
		wantLogged(t, log, was, "is now "+is)
		l.wantProgress(t, "renamed", "bob", "carol")
		l.wantOnlyOK(t, "bob", "carol")
		leave(t, device)
	})
}

// Headscale reuses an address after a restart.
func TestFaults_ReusedAddressIsNewDevice(t *testing.T) {
	underLoad(t, func(l *load) {
		first := joinForTest(t, lab.CallerSpec{Name: "first", Login: "first@example.com"})
		address, _ := first.Server.TailscaleIPs()
		l.add(t, first, conformance.Identity{User: "first@example.com"})
		l.wantProgress(t, "first")
		// Headscale removes a device that has left, but not at once.
		leave(t, first)
		eventually(t, "the first device is removed", func() error {
			if err := theLab.Headscale.DeleteNode(t.Context(), "first"); err == nil || !strings.Contains(err.Error(), "no such node") {
				return fmt.Errorf("it still exists: %w", err)
			}
			return nil
		})
		if err := theLab.Headscale.Killed(t.Context(), func() {}); err != nil {
			t.Fatal(err)
		}
		second := joinForTest(t, lab.CallerSpec{Name: "second", Login: "second@example.com"})
		if got, _ := second.Server.TailscaleIPs(); got != address {
			t.Fatalf("the second device has address %v; want the first's, %v", got, address)
		}
		l.add(t, second, conformance.Identity{User: "second@example.com"})
		l.wantProgress(t, "second", "bob", "carol")
		l.wantOnlyOK(t, "second", "bob", "carol")
		leave(t, second)
	})
}

func TestFaults_TenReloadsPerSecondKeepIdentities(t *testing.T) {
	seconds := 3
	if *long {
		seconds = 60
	}
	defer firstConfig(t)
	underLoad(t, func(l *load) {
		tick := time.NewTicker(time.Second / 10)
		defer tick.Stop()
		for i := range 10 * seconds {
			<-tick.C
			if err := theLab.Caddy.Load(withVersion(fmt.Sprint("reload-", i))); err != nil {
				t.Fatal(err)
			}
		}
		firstConfig(t) // the config whose goroutines were counted
		l.wantProgress(t, "bob", "carol")
	})
}

// joinForTest connects a device to the tailnet. leave removes it.
func joinForTest(t *testing.T, spec lab.CallerSpec) *lab.Caller {
	t.Helper()
	device, err := theLab.Join(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	return device
}

// leave removes a device from the tailnet.
func leave(t *testing.T, device *lab.Caller) {
	t.Helper()
	delete(theLab.Callers, device.Name)
	if err := device.Stop(); err != nil {
		t.Fatal(err)
	}
}

// wantLogged waits until the log says that open requests of a user were ended, and why.
func wantLogged(t *testing.T, log *tailed, user, reason string) {
	t.Helper()
	within(t, revokedWithin, "the log says why", func() error {
		for _, line := range log.lines(t) {
			if strings.Contains(line, "open requests ended") && strings.Contains(line, user) && strings.Contains(line, reason) {
				return nil
			}
		}
		return errors.New("no such line")
	})
}

// wantIdentity waits until a device's requests arrive as a user in groups.
func wantIdentity(t *testing.T, device *lab.Caller, user string, groups ...string) {
	t.Helper()
	client := clientOf(t, device, "HTTP/1.1")
	client.Transport.(*http.Transport).DisableKeepAlives = true
	within(t, time.Minute, device.Name+" is "+user, func() error {
		plain.take()
		status := ask(client, "http://"+lab.ProxyName+":"+portHTTPTransport+"/api")
		requests := plain.take()
		if len(requests) == 0 {
			return fmt.Errorf("its requests are answered with status %d", status)
		}
		h := requests[len(requests)-1].Header
		if h.Get("Impersonate-User") != user || !slices.Equal(h["Impersonate-Group"], groups) {
			return fmt.Errorf("it is %q in groups %q", h["Impersonate-User"], h["Impersonate-Group"])
		}
		return nil
	})
}
