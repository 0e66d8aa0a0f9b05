// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/google/go-cmp/cmp"
	"tailscale.com/client/tailscale/apitype"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/caddyfile"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

func TestMetrics_Decisions(t *testing.T) {
	tagged := proxytest.NewNode(proxytest.WhoIsTagged("ci.example.ts.net.", "tag:ci"), nil)
	counted := []string{"decisions_total", "refusals_total", "cache_lookups_total"}
	tls := func(headers ...string) *http.Request {
		return proxytest.NewRequest("GET", "https://k8s/api", headers...)
	}
	away := proxytest.NewNode(nil, nil)
	away.Addrs = func() (ip4, ip6 netip.Addr) { return }
	for _, tt := range []struct {
		name string
		node *tailnet.Node
		cfg  caddyfile.Config
		r    *http.Request
		want map[string]float64
	}{
		{"grants", proxytest.AliceNode(), caddyfile.Config{}, tls(), map[string]float64{"decisions_total allowed grants": 1, "cache_lookups_total miss": 1}},
		{"tags", tagged, caddyfile.Config{}, tls(), map[string]float64{"decisions_total allowed tags": 1, "cache_lookups_total miss": 1}},
		{"none", proxytest.NewNode(proxytest.WhoIs(), nil), caddyfile.Config{}, tls(), map[string]float64{"decisions_total allowed none": 1, "cache_lookups_total miss": 1}},
		{"CONNECT", proxytest.AliceNode(), caddyfile.Config{}, proxytest.NewRequest("CONNECT", "https://k8s/api"), map[string]float64{"decisions_total refused": 1, "refusals_total protocol": 1}},
		{"origin", proxytest.AliceNode(), caddyfile.Config{}, tls("Origin", "https://evil.example.com"), map[string]float64{"decisions_total refused": 1, "refusals_total web_page": 1}},
		{"site", proxytest.AliceNode(), caddyfile.Config{}, tls("Sec-Fetch-Site", "cross-site"), map[string]float64{"decisions_total refused": 1, "refusals_total web_page": 1}},
		{"host", proxytest.AliceNode(), caddyfile.Config{}, proxytest.NewRequest("GET", "http://evil/api"), map[string]float64{"decisions_total refused": 1, "refusals_total host": 1}},
		{"not from a tailnet", proxytest.AliceNode(), caddyfile.Config{}, httptest.NewRequest("GET", "https://k8s/api", nil), map[string]float64{"decisions_total refused": 1, "refusals_total not_from_tailnet": 1}},
		{"self", proxytest.AliceNode(), caddyfile.Config{}, proxytest.FromPeer(httptest.NewRequest("GET", "https://k8s/api", nil), proxytest.NodeAddr), map[string]float64{"decisions_total refused": 1, "refusals_total self": 1, "cache_lookups_total miss": 1}},
		{"unknown peer", proxytest.NewNode(nil, tailnet.ErrPeerNotFound), caddyfile.Config{}, tls(), map[string]float64{"decisions_total refused": 1, "refusals_total unknown_peer": 1, "cache_lookups_total miss": 1}},
		{"no answer", proxytest.NewNode(nil, errors.New("gone")), caddyfile.Config{}, tls(), map[string]float64{"decisions_total refused": 1, "refusals_total no_answer": 1, "cache_lookups_total miss": 1}},
		{"not connected", away, caddyfile.Config{}, tls(), map[string]float64{"decisions_total refused": 1, "refusals_total starting": 1}},
		{"malformed grants", proxytest.NewNode(proxytest.WhoIs(`"x"`), nil), caddyfile.Config{}, tls(), map[string]float64{"decisions_total refused": 1, "refusals_total no_identity": 1, "cache_lookups_total miss": 1}},
		{"no identity", proxytest.NewNode(&apitype.WhoIsResponse{}, nil), caddyfile.Config{}, tls(), map[string]float64{"decisions_total refused": 1, "refusals_total no_identity": 1, "cache_lookups_total miss": 1}},
		{"deny_tags", tagged, caddyfile.Config{Limits: impersonate.Limits{DenyTags: []string{"tag:ci"}}}, tls(), map[string]float64{"decisions_total refused": 1, "refusals_total guard": 1, "cache_lookups_total miss": 1}},
		{"require_groups", proxytest.NewNode(proxytest.WhoIs(), nil), caddyfile.Config{Limits: impersonate.Limits{RequireGroups: true}}, tls(), map[string]float64{"decisions_total refused": 1, "refusals_total no_groups": 1, "cache_lookups_total miss": 1}},
		{"kubectl --as", proxytest.AliceNode(), caddyfile.Config{}, tls("Impersonate-User", "bob"), map[string]float64{"decisions_total refused": 1, "refusals_total impersonation": 1, "cache_lookups_total miss": 1}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newHandler(t, tt.cfg, tt.node)
			since := proxytest.CountsSince(t, counted...)
			proxytest.Serve(t, h, tt.r)
			if diff := cmp.Diff(tt.want, since()); diff != "" {
				t.Errorf("counted (-want +got):\n%s", diff)
			}
		})
	}
	t.Run("no node", func(t *testing.T) {
		since := proxytest.CountsSince(t, counted...)
		proxytest.Serve(t, newHandler(t, caddyfile.Config{}), tls())
		if diff := cmp.Diff(map[string]float64{"decisions_total refused": 1, "refusals_total ambiguous_node": 1}, since()); diff != "" {
			t.Errorf("counted (-want +got):\n%s", diff)
		}
	})
	t.Run("further requests on a connection", func(t *testing.T) {
		h, another := newHandler(t, caddyfile.Config{}, proxytest.AliceNode()), proxytest.NewConn()
		proxytest.Serve(t, h, another())
		since := proxytest.CountsSince(t, counted...)
		proxytest.Serve(t, h, another())
		proxytest.Serve(t, h, another())
		if diff := cmp.Diff(map[string]float64{"decisions_total allowed grants": 2, "cache_lookups_total hit": 2}, since()); diff != "" {
			t.Errorf("counted (-want +got):\n%s", diff)
		}
	})
}

func TestMetrics_WhoIsDuration(t *testing.T) {
	for outcome, node := range map[string]*tailnet.Node{
		"known":   proxytest.AliceNode(),
		"unknown": proxytest.NewNode(nil, tailnet.ErrPeerNotFound),
		"failed":  proxytest.NewNode(nil, errors.New("gone")),
	} {
		since := proxytest.CountsSince(t, "whois_duration_seconds")
		proxytest.Serve(t, newHandler(t, caddyfile.Config{}, node), proxytest.NewRequest("GET", "https://k8s/api"))
		if diff := cmp.Diff(map[string]float64{"whois_duration_seconds " + outcome: 1}, since()); diff != "" {
			t.Errorf("%s: counted questions (-want +got):\n%s", outcome, diff)
		}
	}
}

// The example dashboard queries only metrics and labels that a running Caddy exposes, and
// shows each of the metrics. The lab tests with Prometheus's own engine that its queries
// have answers.
func TestDashboard_ShowsEachMetric(t *testing.T) {
	up := proxytest.NewAPIServer(t)
	s := proxytest.StartSite(t, up, proxytest.ToKubernetes, proxytest.AliceNode())
	s.Get(t, "/api", "Connection: close\r\n")
	s.HTTP1(t, proxytest.AliceAddr, "GET /api HTTP/1.1\r\nHost: evil\r\nConnection: close\r\n\r\n")
	up.CheckOne(t, proxytest.AliceAsProxy)
	config := caddy.ActiveContext()
	families, err := config.GetMetricsRegistry().Gather()
	if err != nil {
		t.Fatal(err)
	}
	exposed := make(map[string][]string) // the labels of each metric
	for _, family := range families {
		if !strings.HasPrefix(family.GetName(), "caddy_tailscale_impersonate_") {
			continue
		}
		labels := []string{"instance"} // which Prometheus adds
		for _, label := range family.GetMetric()[0].GetLabel() {
			labels = append(labels, label.GetName())
		}
		if name := family.GetName(); family.GetMetric()[0].GetHistogram() != nil {
			exposed[name+"_bucket"] = append(labels, "le")
			exposed[name+"_count"], exposed[name+"_sum"] = labels, labels
		} else {
			exposed[name] = labels
		}
	}

	text, err := os.ReadFile(filepath.Join("examples", "grafana-dashboard.json"))
	if err != nil {
		t.Fatal(err)
	}
	var dashboard any
	if err := json.Unmarshal(text, &dashboard); err != nil {
		t.Fatal(err)
	}
	var (
		metric   = regexp.MustCompile(`caddy_tailscale_impersonate_\w+`)
		selector = regexp.MustCompile(`(\w+)\s*(?:=~|=|!=|!~)\s*"`)
		grouping = regexp.MustCompile(`by \(([^)]*)\)`)
		unused   = make(map[string]bool)
	)
	for name := range exposed {
		unused[strings.TrimSuffix(strings.TrimSuffix(strings.TrimSuffix(name, "_bucket"), "_count"), "_sum")] = true
	}
	exprs := queries(dashboard, "expr")
	if len(exprs) < 10 {
		t.Fatalf("got only the queries %q", exprs)
	}
	for _, expr := range append(exprs, queries(dashboard, "query")...) {
		names := metric.FindAllString(expr, -1)
		for _, name := range names {
			labels, ok := exposed[name]
			if !ok {
				t.Errorf("%s: Caddy exposes no metric %s", expr, name)
				continue
			}
			delete(unused, strings.TrimSuffix(strings.TrimSuffix(name, "_bucket"), "_count"))
			var used []string
			for _, m := range selector.FindAllStringSubmatch(expr, -1) {
				used = append(used, m[1])
			}
			for _, m := range grouping.FindAllStringSubmatch(expr, -1) {
				for label := range strings.SplitSeq(m[1], ",") {
					used = append(used, strings.TrimSpace(label))
				}
			}
			for _, label := range used {
				if !slices.Contains(labels, label) {
					t.Errorf("%s: %s has no label %s, only %v", expr, name, label, labels)
				}
			}
		}
	}
	for name := range unused {
		t.Errorf("the dashboard does not show %s", name)
	}
}

// queries returns the values of all keys of that name in a JSON document.
func queries(v any, key string) (found []string) {
	switch v := v.(type) {
	case []any:
		for _, element := range v {
			found = append(found, queries(element, key)...)
		}
	case map[string]any:
		if text, ok := v[key].(string); ok {
			found = append(found, text)
		}
		for _, element := range v {
			found = append(found, queries(element, key)...)
		}
	}
	return found
}
