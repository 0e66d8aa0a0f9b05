// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/whoami"
)

// The page of a site lists where else the visitor is known, under the URLs that lead there.
func TestWhoami_ListsSitesOfTheVisitor(t *testing.T) {
	const handler = "tailscale_impersonate {\nwhoami\n%s\n}"
	plain := fmt.Sprintf(handler, "")
	site := func(address, body string) string {
		return address + " {\nbind tailnettest/k8s\nprovide_nodes\n" + body + "\n}\n"
	}
	global := "&(named) {\n" + plain + "\n}\n" +
		site("http://:31001", plain) +
		site("http://k8s:31002", fmt.Sprintf(handler, "optional_groups tailnet-readers")) +
		site("http://k8s:31003", "handle_path /a/* {\n"+plain+"\n}\nhandle_path /b%20c/* {\n"+plain+"\n}\nhandle_path /d/* {\nhandle_path /e/* {\n"+plain+"\n}\n}") +
		site("http://k8s:31004", "invoke named") +
		site("http://k8s:31005", "handle /whoami {\n"+plain+"\n}") +
		site("http://one.example.com:31006, http://two.example.com:31006", fmt.Sprintf(handler, "allow_hosts two.example.com")) +
		site("http://k8s:31007, http://k8s.example.ts.net:31007", plain) +
		// Those that no visitor learns of: without the option, or who is refused there.
		site("http://k8s:31020", "tailscale_impersonate") +
		site("http://k8s:31021", fmt.Sprintf(handler, "require_groups\ndeny_groups tailnet-*")) +
		// Behind matchers that are about the request.
		site("http://k8s:31022", "@a remote_ip 100.64.0.0/10\nhandle @a {\n"+plain+"\n}") +
		site("http://k8s:31023", "@a not host other\nroute @a {\n"+plain+"\n}") +
		// Where no request for the page arrives.
		site("http://k8s:31024", "handle /api/* {\n"+plain+"\n}") +
		site("http://k8s:31025", "route {\nrewrite * /x{uri}\n"+plain+"\n}") +
		// Under no name of the node's, or that of the visitor itself.
		site("http://k8s.example.com:31026", plain) +
		site("http://*.example.com:31027", plain) +
		site("http://localhost:31028", plain) +
		// A socket of the host.
		strings.Replace(site("http://k8s:"+fmt.Sprint(proxytest.FreePort(t)), plain), "tailnettest/k8s", "127.0.0.1", 1)
	s := proxytest.Config{API: proxytest.NewAPIServer(t), Global: global, Body: plain, Nodes: []*tailnet.Node{proxytest.AliceNode()}}.Start(t)
	get := func(query, accept string) *http.Response { return s.Get(t, "/whoami"+query, "Accept: "+accept+"\r\n") }

	var facts whoami.Facts
	if err := json.NewDecoder(get("", "application/json").Body).Decode(&facts); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, site := range facts.Sites {
		got = append(got, site.Server)
		if site.User != "alice@example.com" || "http://"+site.Name != site.Server {
			t.Errorf("%s: got %+v", site.Server, site)
		}
	}
	want := []string{
		"http://k8s.example.ts.net:31001",
		"http://k8s:31002",
		"http://k8s:31003/a",
		"http://k8s:31003/b%20c",
		"http://k8s:31003/d/e",
		"http://k8s:31004",
		"http://k8s:31005",
		"http://k8s:31007",
		"http://two.example.com:31006",
	}
	if diff := cmp.Diff(want, got); diff != "" || facts.SitesIncomplete {
		t.Errorf("sites (-want +got), incomplete: %t:\n%s", facts.SitesIncomplete, diff)
	}

	// Its kubeconfig has them all, and one on request.
	contexts := func(query string) (names []string, current string) {
		body, err := io.ReadAll(get(query, "*/*").Body)
		if err != nil {
			t.Fatal(err)
		}
		config, err := clientcmd.Load(body)
		if err != nil {
			t.Fatalf("%s: %v\n%s", query, err, body)
		}
		for name := range config.Contexts {
			names = append(names, name)
		}
		return names, config.CurrentContext
	}
	const own = "k8s:80"                                                                        // as the request says
	if names, current := contexts("?kubeconfig"); len(names) != len(want)+2 || current != own { // the site's own, and one for a group
		t.Errorf("got contexts %q, and %q as the current one", names, current)
	}
	for query, want := range map[string]string{"k8s:31003/a": "k8s:31003/a", "k8s%3A31003%2Fb%2520c": "k8s:31003/b%20c", own: own} {
		if names, current := contexts("?kubeconfig&site=" + query); len(names) != 1 || current != want {
			t.Errorf("%s: got contexts %q, and %q as the current one", query, names, current)
		}
	}
	// There is no telling whether a site exists.
	refusals := make(map[string]bool)
	for _, name := range []string{"k8s:31021", "k8s:31999"} {
		resp := get("?kubeconfig&site="+name, "application/json")
		body, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != http.StatusNotFound {
			t.Errorf("%s: answered %s, %v; want 404", name, resp.Status, err)
		}
		refusals[strings.Replace(string(body), name, "", 1)] = true
	}
	if len(refusals) != 1 {
		t.Errorf("refusals differ: %v", refusals)
	}
}

// A caller that is refused learns where it is known; one that is known nowhere learns
// nothing.
func TestWhoami_RefusedCallerSeesItsSites(t *testing.T) {
	const refuses = "tailscale_impersonate {\nwhoami\nrequire_groups\ndeny_groups tailnet-*\n}"
	for _, tt := range []struct {
		name  string
		other string
		want  []string // contexts
	}{
		{"known elsewhere", "tailscale_impersonate {\nwhoami\n}", []string{"k8s:31101"}},
		{"known nowhere", refuses, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			global := "http://k8s:31101 {\nbind tailnettest/k8s\nprovide_nodes\n" + tt.other + "\n}\n"
			s := proxytest.Config{API: proxytest.NewAPIServer(t), Global: global, Body: refuses, Nodes: []*tailnet.Node{proxytest.AliceNode()}}.Start(t)
			resp := s.Get(t, "/whoami", "Accept: application/json\r\n")
			var facts whoami.Facts
			if err := json.NewDecoder(resp.Body).Decode(&facts); err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, site := range facts.Sites {
				got = append(got, site.Name)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" || resp.StatusCode != http.StatusForbidden || facts.SitesIncomplete {
				t.Errorf("%s: sites (-want +got):\n%s", resp.Status, diff)
			}
			config, err := clientcmd.Load([]byte(facts.Kubeconfig))
			if err != nil {
				t.Fatal(err)
			}
			if tt.want != nil && (len(config.Contexts) != 1 || config.CurrentContext != tt.want[0]) {
				t.Errorf("the kubeconfig is %s", facts.Kubeconfig)
			}
		})
	}
}
