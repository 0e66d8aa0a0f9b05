// SPDX-License-Identifier: Apache-2.0

package caddyfile_test

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2/caddyconfig"
	_ "github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	_ "github.com/caddyserver/caddy/v2/modules/caddyhttp/headers"
	_ "github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	_ "github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy/forwardauth"
	_ "github.com/caddyserver/caddy/v2/modules/caddyhttp/rewrite"
	"github.com/google/go-cmp/cmp"

	_ "github.com/tailscale-impersonate/caddy-tailscale-impersonate"
)

var update = flag.Bool("update", false, "rewrite the expected part of testdata/*.caddyfiletest")

// divider is the line between a Caddyfile and its expected result.
const divider = "----------\n"

// TestAdapt_GoldenFiles adapts the Caddyfile in each testdata/*.caddyfiletest. The JSON has
// to be the text below the divider. In the files named error_*, that is an error.
func TestAdapt_GoldenFiles(t *testing.T) {
	for _, file := range goldenFiles(t, "*") {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".caddyfiletest"), func(t *testing.T) {
			input, want := readGolden(t, file)
			got, err := adapt(t, input)
			if err != nil {
				got = err.Error() + "\n"
			}
			if wantErr := strings.HasPrefix(filepath.Base(file), "error_"); (err != nil) != wantErr {
				t.Fatalf("got error %v; want one: %v", err, wantErr)
			}
			if *update {
				if err := os.WriteFile(file, []byte(input+divider+got), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("result (-want +got):\n%s", diff)
			}
		})
	}
}

// Requests would reach a reverse_proxy before the handler without an identity. Caddy sorts
// directives, so their order in the Caddyfile does not matter.
func TestAdapt_HandlerPrecedesReverseProxy(t *testing.T) {
	files := goldenFiles(t, "order_*")
	if len(files) < 5 {
		t.Fatalf("got only the files %v; want one for each directive that may contain a reverse_proxy", files)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".caddyfiletest"), func(t *testing.T) {
			input, _ := readGolden(t, file)
			// The order in the Caddyfile has to be the wrong one.
			if proxy, handler := strings.Index(input, "reverse_proxy"), strings.Index(input, "tailscale_impersonate"); handler < proxy {
				t.Fatal("the Caddyfile names tailscale_impersonate before reverse_proxy, so the test would see no difference")
			}
			config, err := adapt(t, input)
			if err != nil {
				t.Fatal(err)
			}
			handlers := running(t, config)
			if len(handlers) < 2 || handlers[0] != "tailscale_impersonate" || handlers[len(handlers)-1] != "reverse_proxy" {
				t.Errorf("got handlers in the order %v; want tailscale_impersonate first and reverse_proxy last", handlers)
			}
		})
	}
}

func TestAdapt_IndependentOfTheMachine(t *testing.T) {
	// A pod, where transport kubernetes without options is in_cluster.
	inPod := func(t *testing.T) {
		t.Setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
		t.Setenv("KUBERNETES_SERVICE_PORT", "443")
		t.Setenv("KUBECONFIG", "/nowhere/config")
	}
	for _, file := range goldenFiles(t, "transport_*") {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".caddyfiletest"), func(t *testing.T) {
			input, want := readGolden(t, file)
			inPod(t)
			t.Chdir(t.TempDir())
			got, err := adapt(t, input)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("result inside of a pod (-want +got):\n%s", diff)
			}
		})
	}
}

func goldenFiles(t *testing.T, pattern string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("testdata", pattern+".caddyfiletest"))
	if err != nil {
		t.Fatal(err)
	}
	if len(files) == 0 {
		t.Fatalf("no files match testdata/%s.caddyfiletest", pattern)
	}
	for i, file := range files {
		if files[i], err = filepath.Abs(file); err != nil {
			t.Fatal(err)
		}
	}
	return files
}

func readGolden(t *testing.T, file string) (input, want string) {
	t.Helper()
	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	input, want, ok := strings.Cut(string(content), divider)
	if !ok {
		t.Fatalf("%s has no line of %s", file, strings.TrimSpace(divider))
	}
	return input, want
}

// adapt returns the JSON of a Caddyfile. Warnings fail the test: the Caddyfiles have the
// format of caddy fmt.
func adapt(t *testing.T, input string) (string, error) {
	t.Helper()
	config, warnings, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(input), nil)
	if err != nil {
		return "", err
	}
	for _, warning := range warnings {
		t.Errorf("warning: %v", warning)
	}
	var out bytes.Buffer
	if err := json.Indent(&out, config, "", "\t"); err != nil {
		t.Fatal(err)
	}
	out.WriteByte('\n')
	return out.String(), nil
}

// running returns the names of the handlers of the only server in config, in the order in
// which they handle a request that matches all routes. It lists the handlers inside
// subroute and invoke instead of these.
func running(t *testing.T, config string) []string {
	t.Helper()
	type routes []struct {
		Handle []json.RawMessage `json:"handle"`
	}
	var c struct {
		Apps struct {
			HTTP struct {
				Servers map[string]struct {
					Routes      routes                     `json:"routes"`
					NamedRoutes map[string]json.RawMessage `json:"named_routes"`
				} `json:"servers"`
			} `json:"http"`
		} `json:"apps"`
	}
	if err := json.Unmarshal([]byte(config), &c); err != nil {
		t.Fatal(err)
	}
	server, ok := c.Apps.HTTP.Servers["srv0"]
	if !ok || len(c.Apps.HTTP.Servers) != 1 {
		t.Fatalf("the config does not have exactly one server:\n%s", config)
	}

	var names []string
	var visit func(routes)
	visit = func(rs routes) {
		for _, r := range rs {
			for _, raw := range r.Handle {
				var h struct {
					Handler string `json:"handler"`
					Name    string `json:"name"`
					Routes  routes `json:"routes"`
				}
				if err := json.Unmarshal(raw, &h); err != nil {
					t.Fatal(err)
				}
				switch h.Handler {
				case "subroute":
					visit(h.Routes)
				case "invoke":
					var named routes
					if err := json.Unmarshal([]byte("["+string(server.NamedRoutes[h.Name])+"]"), &named); err != nil {
						t.Fatal(err)
					}
					visit(named)
				default:
					names = append(names, h.Handler)
				}
			}
		}
	}
	visit(server.Routes)
	return names
}
