// SPDX-License-Identifier: Apache-2.0

package caddyfile_test

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"tailscale.com/paths"
	"tailscale.com/tailcfg"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/caddyfile"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
)

// configFrom returns the configuration that a JSON config holds.
func configFrom(t *testing.T, text string) caddyfile.Config {
	t.Helper()
	d := json.NewDecoder(strings.NewReader(text))
	d.DisallowUnknownFields()
	var c caddyfile.Config
	if err := d.Decode(&c); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return c
}

func TestConfig_ValidSurvivesJSON(t *testing.T) {
	for _, text := range []string{
		`{}`,
		`{"capability": "example.com/cap/kubernetes-staging"}`,
		`{"client_impersonation": "reject"}`,
		`{"client_impersonation": "strip"}`,
		`{"allow_origins": []}`,
		`{"allow_origins": ["https://dashboard.example.com"]}`,
		`{"allow_origins": ["http://localhost:8080", "https://dashboard.example.com:8443", "http://127.0.0.1", "https://[::1]:8443"]}`,
		`{"allow_origins": ["http://dashboard.example.com:443", "https://dashboard.example.com:80"]}`,
		`{"allow_origins": ["https://*.example.com", "https://*.example.com:*", "http://localhost:*", "file://"]}`,
		`{"allow_hosts": ["k8s.example.com", "localhost", "192.0.2.1", "2001:db8::1"]}`,
	} {
		c := configFrom(t, text)
		if err := c.Validate(); err != nil {
			t.Errorf("%s: got error %v; want none", text, err)
		}
		written, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(c, configFrom(t, string(written)), cmp.Transformer("empty", func(s []string) []string { return append([]string{}, s...) })); diff != "" {
			t.Errorf("%s: config written and read again (-before +after):\n%s", text, diff)
		}
	}
}

func TestConfig_ErrorsNameOptionAndValue(t *testing.T) {
	for _, tt := range []struct{ text, option, value string }{
		{`{"capability": "a b"}`, "capability", `"a b"`},
		{`{"capability": "a\n"}`, "capability", `"a\n"`},
		{`{"capability": "\ta"}`, "capability", `"\ta"`},
		{`{"capability": "a\r"}`, "capability", `"a\r"`},
		{`{"capability": " "}`, "capability", `" "`},

		{`{"client_impersonation": "allow"}`, "client_impersonation", `"allow"`},
		{`{"client_impersonation": "Strip"}`, "client_impersonation", `"Strip"`},
		{`{"client_impersonation": "strip "}`, "client_impersonation", `"strip "`},

		{`{"events": "file"}`, "events", `"file"`},
		{`{"event_body_limit": -1}`, "event_body_limit", "-1"},
		{`{"record": "a", "record_max_size": -1}`, "record_max_size", "-1"},
		{`{"record": "a", "record_retention": "59m"}`, "record_retention", "59m0s"},
		{`{"record": "a", "record_retention": 0}`, "record_retention", "0s"},
		{`{"record_input": "echoed"}`, "record_input", `"echoed"`},
		{`{"enforced_sessions": ["exec", "portforward"]}`, "enforced_sessions", `"portforward"`},
		{`{"event_body_limit": 4194305}`, "event_body_limit", "4194305"},

		{`{"allow_origins": [""]}`, "allow_origins", `""`},
		{`{"allow_origins": ["null"]}`, "allow_origins", `"null"`},
		{`{"allow_origins": ["*"]}`, "allow_origins", `"*"`},
		{`{"allow_origins": ["dashboard.example.com"]}`, "allow_origins", `"dashboard.example.com"`},
		{`{"allow_origins": ["//dashboard.example.com"]}`, "allow_origins", `"//dashboard.example.com"`},
		{`{"allow_origins": ["https://"]}`, "allow_origins", `"https://"`},
		{`{"allow_origins": ["https:dashboard.example.com"]}`, "allow_origins", `"https:dashboard.example.com"`},
		{`{"allow_origins": ["https://dashboard.example.com/"]}`, "allow_origins", `"https://dashboard.example.com/"`},
		{`{"allow_origins": ["https://dashboard.example.com/app"]}`, "allow_origins", `"https://dashboard.example.com/app"`},
		{`{"allow_origins": ["https://dashboard.example.com?"]}`, "allow_origins", `"https://dashboard.example.com?"`},
		{`{"allow_origins": ["https://dashboard.example.com#a"]}`, "allow_origins", `"https://dashboard.example.com#a"`},
		{`{"allow_origins": ["https://alice@dashboard.example.com"]}`, "allow_origins", `"https://alice@dashboard.example.com"`},
		{`{"allow_origins": ["https://*"]}`, "allow_origins", `"https://*"`},
		{`{"allow_origins": ["https://*:*"]}`, "allow_origins", `"https://*:*"`},
		{`{"allow_origins": ["https://*."]}`, "allow_origins", `"https://*."`},
		{`{"allow_origins": ["https://*example.com"]}`, "allow_origins", `"https://*example.com"`},
		{`{"allow_origins": ["https://*.*.example.com"]}`, "allow_origins", `"https://*.*.example.com"`},
		{`{"allow_origins": ["https://a.*.example.com"]}`, "allow_origins", `"https://a.*.example.com"`},
		{`{"allow_origins": ["https://example.com:4*"]}`, "allow_origins", `"https://example.com:4*"`},
		{`{"allow_origins": ["*://example.com"]}`, "allow_origins", `"*://example.com"`},
		{`{"allow_origins": ["file:///"]}`, "allow_origins", `"file:///"`},
		{`{"allow_origins": ["https://Dashboard.example.com"]}`, "allow_origins", `"https://Dashboard.example.com"`},
		{`{"allow_origins": ["HTTPS://dashboard.example.com"]}`, "allow_origins", `"HTTPS://dashboard.example.com"`},
		{`{"allow_origins": ["https://dashboard.example.com:443"]}`, "allow_origins", `"https://dashboard.example.com:443"`},
		{`{"allow_origins": ["http://dashboard.example.com:80"]}`, "allow_origins", `"http://dashboard.example.com:80"`},
		{`{"allow_origins": ["ftp://dashboard.example.com"]}`, "allow_origins", `"ftp://dashboard.example.com"`},
		{`{"allow_origins": ["https://dashboard.example.com:x"]}`, "allow_origins", `"https://dashboard.example.com:x"`},
		{`{"allow_origins": ["https://dashboard.example.com:"]}`, "allow_origins", `"https://dashboard.example.com:"`},
		{`{"read_only_group": "vüers"}`, "read_only_group", `"vüers"`},
		{`{"allow_origins": ["https://good.example", "null"]}`, "allow_origins", `"null"`},

		{`{"allow_hosts": [""]}`, "allow_hosts", `""`},
		{`{"allow_hosts": ["*"]}`, "allow_hosts", `"*"`},
		{`{"allow_hosts": ["*.example.com"]}`, "allow_hosts", `"*.example.com"`},
		{`{"allow_hosts": ["K8s.example.com"]}`, "allow_hosts", `"K8s.example.com"`},
		{`{"allow_hosts": ["k8s.example.com."]}`, "allow_hosts", `"k8s.example.com."`},
		{`{"allow_hosts": ["k8s.example.com:80"]}`, "allow_hosts", `"k8s.example.com:80"`},
		{`{"allow_hosts": ["[2001:db8::1]"]}`, "allow_hosts", `"[2001:db8::1]"`},
		{`{"allow_hosts": ["http://k8s.example.com"]}`, "allow_hosts", `"http://k8s.example.com"`},
		{`{"allow_hosts": ["k8s.example.com/api"]}`, "allow_hosts", `"k8s.example.com/api"`},
		{`{"allow_hosts": ["k8s example"]}`, "allow_hosts", `"k8s example"`},
		{`{"allow_hosts": ["k8s.example.com", ""]}`, "allow_hosts", `""`},
	} {
		c := configFrom(t, tt.text)
		err := c.Validate()
		if err == nil {
			t.Errorf("%s: got no error; want one", tt.text)
			continue
		}
		if got, want := err.Error(), tt.option+" "+tt.value+": "; !strings.HasPrefix(got, want) {
			t.Errorf("%s: got error %q; want one that starts with %q", tt.text, got, want)
		}
	}
}

func TestConfig_CapabilityReplacesDefaults(t *testing.T) {
	for _, tt := range []struct {
		config caddyfile.Config
		want   []tailcfg.PeerCapability
	}{
		{caddyfile.Config{}, impersonate.Capabilities},
		{caddyfile.Config{Capability: "example.com/cap/staging"}, []tailcfg.PeerCapability{"example.com/cap/staging"}},
	} {
		if diff := cmp.Diff(tt.want, tt.config.Capabilities()); diff != "" {
			t.Errorf("capabilities of %+v (-want +got):\n%s", tt.config, diff)
		}
	}
}

func TestConfig_OriginWithoutPortSaysSo(t *testing.T) {
	err := (&caddyfile.Config{AllowOrigins: []string{"https://dashboard.example.com:"}}).Validate()
	if err == nil || !strings.Contains(err.Error(), "the port is missing") {
		t.Errorf("got error %v", err)
	}
}

func TestConfig_DefaultSizes(t *testing.T) {
	c := new(caddyfile.Config)
	if got := c.BodyLimit(); got != 64<<10 {
		t.Errorf("got event_body_limit %d; want 64 KiB", got)
	}
	if got := c.MaxRecordSize(); got != 1<<30 {
		t.Errorf("got record_max_size %d; want 1 GiB", got)
	}
}

func TestConfig_DaemonSocket(t *testing.T) {
	for tailscaled, want := range map[string]string{"": "", "default": paths.DefaultTailscaledSocket(), "/run/other.sock": "/run/other.sock"} {
		if got := (&caddyfile.Config{Tailscaled: tailscaled}).DaemonSocket(); got != want {
			t.Errorf("tailscaled %q: got %q; want %q", tailscaled, got, want)
		}
	}
}

func TestConfig_WhoamiHidesNothingOfTheAPIServer(t *testing.T) {
	for _, first := range []string{"api", "apis", "debug", "flagz", "healthz", "livez", "logs", "metrics", "openapi", "openid", "readyz", "statusz", "swagger.json", "version", ".well-known"} {
		for _, path := range []string{"/" + first, "/" + first + "/a"} {
			if err := (&caddyfile.Config{Whoami: path}).Validate(); err == nil || !strings.Contains(err.Error(), "the API server answers requests for /"+first) {
				t.Errorf("whoami %s: got error %v", path, err)
			}
		}
	}
}
