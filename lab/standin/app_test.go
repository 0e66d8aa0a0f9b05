// SPDX-License-Identifier: Apache-2.0

package standin

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2/caddyconfig"
	_ "github.com/caddyserver/caddy/v2/modules/standard"
	"github.com/google/go-cmp/cmp"
)

func TestMain(m *testing.M) {
	// Nodes must not send their logs.
	if err := os.Setenv("TS_NO_LOGS_NO_SUPPORT", "true"); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

// adapt returns the tailscale app of a Caddyfile, as JSON.
func adapt(t *testing.T, caddyfile string) (string, error) {
	t.Helper()
	adapted, warnings, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(caddyfile), nil)
	if err != nil {
		return "", err
	}
	for _, w := range warnings {
		if !strings.Contains(w.Message, "not formatted") {
			t.Errorf("unexpected warning: %v", w)
		}
	}
	var config struct {
		Apps struct {
			Tailscale json.RawMessage `json:"tailscale"`
		} `json:"apps"`
	}
	if err := json.Unmarshal(adapted, &config); err != nil {
		t.Fatal(err)
	}
	return string(config.Apps.Tailscale), nil
}

func TestCaddyfile(t *testing.T) {
	for _, tt := range []struct {
		name, options, want string
	}{
		{"nothing", `tailscale`, `{}`},
		{"empty block", "tailscale {\n}", `{}`},
		{
			"everything", `tailscale {
				auth_key {env.TS_AUTHKEY}
				control_url https://control.example
				ephemeral
				hang_on_close
				state_dir /data/tailscale
				tags tag:k8s tag:proxy
				webui false
				k8s {
					auth_key tskey
					control_url https://other.example
					ephemeral false
					hostname prod
					port 41641
					state_dir /data/prod
					tags tag:prod
					webui
				}
				plain {
				}
			}`,
			`{"auth_key":"{env.TS_AUTHKEY}","control_url":"https://control.example","ephemeral":true,` +
				`"state_dir":"/data/tailscale","tags":["tag:k8s","tag:proxy"],` +
				`"nodes":{"k8s":{"auth_key":"tskey","control_url":"https://other.example","ephemeral":false,` +
				`"hostname":"prod","port":41641,"state_dir":"/data/prod","tags":["tag:prod"],"webui":true},"plain":{}},"hang_on_close":true}`,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := adapt(t, "{\n"+tt.options+"\n}\n")
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("adapted app (-want +got):\n%s", diff)
			}
		})
	}
}

// Every unknown token is an error that names it.
func TestCaddyfile_Errors(t *testing.T) {
	for _, tt := range []struct {
		options, want string
	}{
		{"tailscale k8s", `unexpected 'k8s' after 'tailscale'`},
		{"tailscale\ntailscale", `repeated global option 'tailscale'`},
		{"tailscale {\nephemral true\n}", `unrecognized tailscale option 'ephemral'`},
		{"tailscale {\nephemral\n}", `unrecognized tailscale option 'ephemral' (a node has a block)`},
		{"tailscale {\nauth_key\n}", `missing value for 'auth_key'`},
		{"tailscale {\nauth_key a b\n}", `unexpected 'b' after the value`},
		{"tailscale {\nauth_key a\nauth_key b\n}", `repeated 'auth_key' in tailscale`},
		{"tailscale {\nauth_key a {\n}\n}", `unrecognized tailscale option '{'`},
		{"tailscale {\ntags\n}", `missing value for 'tags'`},
		{"tailscale {\nephemeral maybe\n}", `'ephemeral' is either true or false, not 'maybe'`},
		{"tailscale {\nwebui true false\n}", `unexpected 'false' after 'webui true'`},
		{"tailscale {\nhostname k8s\n}", `unrecognized tailscale option 'hostname'`},
		{"tailscale {\nk8s {\n}\nk8s {\n}\n}", `repeated 'k8s' in tailscale`},
		{"tailscale {\nk8s {\nport 70000\n}\n}", `port '70000'`},
		{"tailscale {\nk8s {\nport\n}\n}", `missing value for 'port'`},
		{"tailscale {\nk8s {\nhostname a\nhostname b\n}\n}", `repeated 'hostname' in tailscale node 'k8s'`},
		{"tailscale {\nk8s {\nnested {\n}\n}\n}", `unrecognized option 'nested' in tailscale node 'k8s'`},
	} {
		got, err := adapt(t, "{\n"+tt.options+"\n}\n")
		if err == nil {
			t.Errorf("%q: adapted to %s; want an error", tt.options, got)
			continue
		}
		if !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%q: got error %q; want one with %q", tt.options, err, tt.want)
		}
	}
}

func TestSettings(t *testing.T) {
	t.Setenv("TS_AUTHKEY", "from-environment")
	t.Setenv("STANDIN_TEST", "expanded")
	t.Setenv("XDG_CONFIG_HOME", "/home/me/.config")
	yes, no := true, false

	type settings struct {
		AuthKey, ControlURL, Hostname, Dir string
		Ephemeral, WebUI                   bool
		Port                               uint16
		Tags                               []string
	}
	for _, tt := range []struct {
		name string
		app  App
		want settings
	}{
		{"defaults", App{}, settings{
			AuthKey: "from-environment", Hostname: "k8s",
			Dir: filepath.Join("/home/me/.config", "caddy-tailscale-standin", "k8s"),
		}},
		{"empty node", App{StateDir: "/data", Nodes: map[string]*NodeConfig{"k8s": nil}}, settings{
			AuthKey: "from-environment", Hostname: "k8s", Dir: "/data/k8s",
		}},
		{"app", App{
			AuthKey: "{env.STANDIN_TEST}", ControlURL: "https://{env.STANDIN_TEST}", Ephemeral: true,
			StateDir: "/data/{env.STANDIN_TEST}", Tags: []string{"tag:{env.STANDIN_TEST}"}, WebUI: true,
		}, settings{
			AuthKey: "expanded", ControlURL: "https://expanded", Hostname: "k8s", Dir: "/data/expanded/k8s",
			Ephemeral: true, WebUI: true, Tags: []string{"tag:expanded"},
		}},
		{"node before app", App{
			AuthKey: "app", ControlURL: "https://app", Ephemeral: true, StateDir: "/app", Tags: []string{"tag:app"},
			Nodes: map[string]*NodeConfig{
				"k8s": {
					AuthKey: "node", ControlURL: "https://node", Ephemeral: &no, Hostname: "prod", Port: 41641,
					StateDir: "/node", Tags: []string{"tag:node"}, WebUI: &yes,
				},
				"other": {AuthKey: "other"},
			},
		}, settings{
			AuthKey: "node", ControlURL: "https://node", Hostname: "prod", Dir: "/node",
			WebUI: true, Port: 41641, Tags: []string{"tag:node"},
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, err := tt.app.server("k8s")
			if err != nil {
				t.Fatal(err)
			}
			got := settings{
				s.AuthKey, s.ControlURL, s.Hostname, s.Dir, s.Ephemeral, s.RunWebClient, s.Port, s.AdvertiseTags,
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("settings (-want +got):\n%s", diff)
			}
		})
	}

	// As with caddy-tailscale, placeholders have to be set.
	for placeholder, app := range map[string]App{
		"no.such.placeholder":    {ControlURL: "{no.such.placeholder}"},
		"env.STANDIN_TEST_UNSET": {ControlURL: "{env.STANDIN_TEST_UNSET}"},
	} {
		s, err := app.server("k8s")
		if err == nil || !strings.Contains(err.Error(), `control_url`) || !strings.Contains(err.Error(), placeholder) {
			t.Errorf("%s: got %v, error %v; want an error that names the option and the placeholder", placeholder, s, err)
		}
	}
}

func TestNode_Unknown(t *testing.T) {
	if s, ok := Node("nobody"); ok || s != nil {
		t.Errorf("Node(nobody) = %v, %v; want nil, false", s, ok)
	}
}
