// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"net/http"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/google/go-cmp/cmp"
	"tailscale.com/tailcfg"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/caddyfile"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// knownNode is a node that knows alice by her IDs as well.
func knownNode() *tailnet.Node {
	who := whoIs(readers)
	who.Node.StableID, who.UserProfile.ID = "nLAPTOP", tailcfg.UserID(42)
	return newNode(who, nil)
}

// prepared returns r with all that Caddy gives a request.
func prepared(r *http.Request) *http.Request {
	return caddyhttp.PrepareRequest(r, caddy.NewReplacer(), noAnswer{}, nil)
}

func TestWithAuditTheAPIServerIsToldOfTheDevice(t *testing.T) {
	h := newHandler(t, caddyfile.Config{Audit: true}, knownNode())
	var ids []string
	for range 2 { // the second answer comes from the cache
		r := prepared(newRequest("GET", "http://k8s/api", "Audit-Id", "forged"))
		resp, got := serve(t, h, r)
		if got == nil {
			t.Fatalf("refused: %v", resp.Status)
		}
		id := got.Header.Get("Audit-Id")
		const domain = "Impersonate-Extra-Tailscale-Impersonate.github.io%2f"
		want := http.Header{
			"Impersonate-User":       {"alice@example.com"},
			"Impersonate-Group":      {"tailnet-readers"},
			"Impersonate-Uid":        {"42"},
			domain + "node":          {"laptop.example.ts.net"},
			domain + "node-Id":       {"nLAPTOP"},
			domain + "address":       {aliceAddr},
			domain + "groups-Source": {"grants"},
			domain + "request-Id":    {id},
		}
		if diff := cmp.Diff(want, protected(got.Header)); diff != "" {
			t.Errorf("headers differ (-want +got):\n%s", diff)
		}
		if uuid, _ := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer).GetString("http.request.uuid"); id == "" || id != uuid {
			t.Errorf("the request's ID is %q; want Caddy's, %q", id, uuid)
		}
		if carried, _ := impersonate.FromContext(got.Context()); carried.RequestID != id || carried.UID != "42" {
			t.Errorf("the context carries %+v; want the same as the headers", carried)
		}
		for name := range r.Header {
			if strings.HasPrefix(name, "Impersonate-") || name == "Audit-Id" {
				t.Errorf("%s remains on the request", name)
			}
		}
		ids = append(ids, id)
	}
	if ids[0] == ids[1] {
		t.Errorf("two requests have the ID %s", ids[0])
	}
}

func TestWithoutAuditTheAPIServerChoosesTheID(t *testing.T) {
	_, got := serve(t, newHandler(t, caddyfile.Config{}, knownNode()), prepared(newRequest("GET", "http://k8s/api", "Audit-Id", "forged")))
	if got == nil {
		t.Fatal("refused")
	}
	if got.Header["Audit-Id"] != nil {
		t.Errorf("got Audit-Id %q; want none", got.Header["Audit-Id"])
	}
	want := http.Header{"Impersonate-User": {"alice@example.com"}, "Impersonate-Group": {"tailnet-readers"}}
	if diff := cmp.Diff(want, protected(got.Header)); diff != "" {
		t.Errorf("headers differ (-want +got):\n%s", diff)
	}
}

func TestWithAuditADeviceWithoutAnIDIsRefused(t *testing.T) {
	resp, got := serve(t, newHandler(t, caddyfile.Config{Audit: true}, aliceNode()), newRequest("GET", "http://k8s/api"))
	if got != nil {
		t.Errorf("the next handler was called, with %v", got.Header)
	}
	checkRefused(t, resp, forbidden, "alice@example.com", "audit is on")
}
