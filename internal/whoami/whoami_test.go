// SPDX-License-Identifier: Apache-2.0

package whoami_test

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"html"
	"io"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/whoami"
)

// alice returns facts with all fields of a caller that is not refused.
func alice() *whoami.Facts {
	return &whoami.Facts{
		User: "alice@example.com", Source: "grants",
		Groups:   []whoami.Group{{Name: "readers", Grants: []int{1, 2, 3}}, {Name: "editors", Grants: []int{1}}, {Name: "tag:k8s"}},
		HeldBack: []whoami.Group{{Name: "admins", Grants: []int{2}}, {Name: "it's; rm *", Grants: []int{2}}},
		Cut:      []whoami.Cut{{Name: "system:masters", Option: "deny_groups", Grants: []int{2}}},
		ID:       "nABC", Device: "laptop.example.ts.net", Address: "100.64.0.2", Login: "alice@example.com",
		Capability: "tailscale.com/cap/kubernetes", LooksFor: "tailscale.com/cap/kubernetes",
		Grants: []whoami.Grant{
			{Value: json.RawMessage(`{"impersonate":{"groups":["readers","editors"]}}`), Groups: []string{"readers", "editors"}},
			{Value: json.RawMessage(`{"impersonate":{"groups":["system:masters","readers"]}}`), Groups: []string{"system:masters", "readers"}},
			{Value: json.RawMessage(`{"impersonate":{"groups":["readers"]}}`), Groups: []string{"readers"}},
		},
		Recording: whoami.Recording{Wanted: true, Recorders: []string{"100.64.0.9:80"}},
		Proxy:     "k8s", Server: "https://k8s.example.ts.net",
	}
}

// dave returns facts about a caller that is refused.
func dave() *whoami.Facts {
	return &whoami.Facts{
		Refused: `tailscale_impersonate: dave@example.com on phone.example.ts.net may not use this server`, Reason: "no_groups",
		Device: "phone.example.ts.net", Address: "100.64.0.3", Login: "dave@example.com",
		LooksFor: "tailscale.com/cap/kubernetes", Proxy: "k8s", Server: "https://k8s.example.ts.net",
	}
}

// ci returns facts about a tagged device with a grant that looks right and is not.
func ci() *whoami.Facts {
	return &whoami.Facts{
		User: "ci.example.ts.net", Source: "none", Device: "ci.example.ts.net", Address: "100.64.0.4", Tags: []string{"tag:ci"}, TagsLeftOut: true,
		Capability: "tailscale.com/cap/kubernetes", LooksFor: "tailscale.com/cap/kubernetes",
		Grants: []whoami.Grant{
			{Value: json.RawMessage(`{}`)},
			{Value: json.RawMessage(`{"impersonate":{"group":["readers"]}}`), Problems: []string{`unknown key "impersonate.group"; the nearest known key is "impersonate.groups"`}},
		},
		Proxy: "k8s", Server: "https://k8s.example.ts.net",
	}
}

func TestPage_ShowsProblemsOfGrants(t *testing.T) {
	_, body := get(t, ci(), "GET", "/whoami", browser)
	text := html.UnescapeString(body)
	for _, want := range []string{"The tags of this device are not its groups", `Problem: unknown key "impersonate.group"; the nearest known key is "impersonate.groups"`} {
		if strings.Count(text, want) != 1 {
			t.Errorf("the page does not say %q once:\n%s", want, text)
		}
	}
	if _, body := get(t, alice(), "GET", "/whoami", browser); strings.Contains(body, "Problem:") || strings.Contains(body, "are not its groups") {
		t.Errorf("the page has a problem that is not there:\n%s", body)
	}
}

// All grants with a problem are open, even if there are many grants.
func TestPage_OpensGrantsWithProblems(t *testing.T) {
	f := ci()
	f.Grants = append(f.Grants, f.Grants[0], f.Grants[0], f.Grants[0])
	if _, body := get(t, f, "GET", "/whoami", browser); strings.Count(body, "<details open>") != 1 || strings.Count(body, "<details>") != 4 {
		t.Errorf("the page opens other grants than the second:\n%s", body)
	}
}

func TestText_ShowsProblemsOfGrants(t *testing.T) {
	var out strings.Builder
	if err := whoami.WriteText(&out, ci()); err != nil {
		t.Fatal(err)
	}
	want := `device ci.example.ts.net (100.64.0.4), says tailnet node "k8s"
  user        ci.example.ts.net
  groups      none
  tags        tag:ci
  left out    the tags are not groups, as a grant has a problem
  recording   no
  grant 1     tailscale.com/cap/kubernetes: {}
  grant 2     tailscale.com/cap/kubernetes: {"impersonate":{"group":["readers"]}}
  problem     unknown key "impersonate.group"; the nearest known key is "impersonate.groups"
`
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Errorf("text (-want +got):\n%s", diff)
	}
}

// get returns the answer to a request with that target and Accept.
func get(t *testing.T, f *whoami.Facts, method, target, accept string) (*http.Response, string) {
	t.Helper()
	r := httptest.NewRequest(method, target, nil)
	if accept != "" {
		r.Header.Set("Accept", accept)
	}
	rec := httptest.NewRecorder()
	if err := whoami.Serve(rec, r, f); err != nil {
		t.Fatal(err)
	}
	resp := rec.Result()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(body)
}

const browser = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8,application/json"

func TestPage_ShowsAllFacts(t *testing.T) {
	resp, body := get(t, alice(), "GET", "/whoami", browser)
	if resp.StatusCode != http.StatusOK || !strings.HasPrefix(resp.Header.Get("Content-Type"), "text/html") {
		t.Errorf("answered %s as %s", resp.Status, resp.Header.Get("Content-Type"))
	}
	text := html.UnescapeString(body)
	for _, want := range []string{
		"alice@example.com", "laptop.example.ts.net", "100.64.0.2",
		"from grants 1, 2 and 3", "from grant 1", "from a tag of this device",
		"tailscale.com/cap/kubernetes", `"system:masters"`, "deny_groups",
		"kubectl --as=alice@example.com --as-group=admins", `--as-group='it'\''s; rm *'`,
		"Your sessions are recorded", "100.64.0.9:80", "goes on if no recorder",
		"server: https://k8s.example.ts.net", `href="?kubeconfig"`,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the page does not say %q", want)
		}
	}
}

func TestPage_ShowsRecordingToFiles(t *testing.T) {
	f := alice()
	f.Recording = whoami.Recording{Wanted: true, Files: true}
	_, body := get(t, f, "GET", "/whoami", browser)
	if !strings.Contains(body, "The proxy keeps the recordings of all sessions") || strings.Contains(body, "goes on if no recorder") {
		t.Errorf("the page does not say that sessions go to files:\n%s", body)
	}
}

func TestPage_ShowsTheReasonOfARefusal(t *testing.T) {
	resp, body := get(t, dave(), "GET", "/whoami", browser)
	if resp.StatusCode != http.StatusForbidden {
		t.Errorf("answered %s; want 403", resp.Status)
	}
	for _, want := range []string{"You are refused", "dave@example.com on phone.example.ts.net may not use this server"} {
		if !strings.Contains(body, want) {
			t.Errorf("the page does not say %q", want)
		}
	}
	for _, not := range []string{"You are known", "not recorded", "kubeconfig"} {
		if strings.Contains(body, not) {
			t.Errorf("the page says %q to a refused caller", not)
		}
	}
}

// Users compare the fingerprint of a private authority.
func TestPage_ShowsPrivateCA(t *testing.T) {
	server := httptest.NewTLSServer(nil)
	defer server.Close()
	f := alice()
	f.CA = server.Certificate()
	want := fmt.Sprintf("%X", sha256.Sum256(f.CA.Raw))
	_, body := get(t, f, "GET", "/whoami", browser)
	if got := strings.ReplaceAll(body, ":", ""); !strings.Contains(got, "<code>"+want+"</code>") {
		t.Errorf("the page lacks the fingerprint %s:\n%s", want, body)
	}
	if !strings.Contains(body, "certificate-authority-data: ") {
		t.Errorf("the page's kubeconfig has no CA:\n%s", body)
	}
	_, body = get(t, f, "GET", "/whoami", "application/json")
	var facts whoami.Facts
	if err := json.Unmarshal([]byte(body), &facts); err != nil {
		t.Fatal(err)
	}
	if strings.ReplaceAll(facts.CAFingerprint, ":", "") != want {
		t.Errorf("as JSON: got fingerprint %q; want %s", facts.CAFingerprint, want)
	}
	if _, body := get(t, alice(), "GET", "/whoami", browser); strings.Contains(body, "private authority") {
		t.Error("the page tells a reader of a public site about a private authority")
	}
}

// The page has no script and loads nothing, and its policy would allow neither. The hash in
// the policy is that of the page's style.
func TestPage_SelfContained(t *testing.T) {
	elsewhere, _ := withSites(alice())
	for name, f := range map[string]*whoami.Facts{"known": alice(), "refused": dave(), "misspelt": ci(), "elsewhere": elsewhere} {
		resp, body := get(t, f, "GET", "/whoami", browser)
		if m := regexp.MustCompile(`(?i)<script|<iframe|<form|\son[a-z]+=|javascript:|src=|@import|url\(|style=`).FindString(body); m != "" {
			t.Errorf("%s: the page holds %q", name, m)
		}
		for _, link := range regexp.MustCompile(`href="([^"]*)"`).FindAllStringSubmatch(body, -1) {
			if !strings.HasPrefix(link[1], "?kubeconfig") && link[1] != "data:," {
				t.Errorf("%s: the page links to %q", name, link[1])
			}
		}
		styles := regexp.MustCompile(`(?s)<style>(.*?)</style>`).FindAllStringSubmatch(body, -1)
		if len(styles) != 1 {
			t.Fatalf("%s: got %d styles; want 1", name, len(styles))
		}
		sum := sha256.Sum256([]byte(styles[0][1]))
		want := http.Header{
			"Cache-Control":                {"no-store"},
			"Content-Security-Policy":      {"default-src 'none'; style-src 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"},
			"Cross-Origin-Opener-Policy":   {"same-origin"},
			"Cross-Origin-Resource-Policy": {"same-origin"},
			"Referrer-Policy":              {"no-referrer"},
			"X-Content-Type-Options":       {"nosniff"},
			"X-Frame-Options":              {"DENY"},
			"Vary":                         {"Accept"},
		}
		got := resp.Header.Clone()
		got.Del("Content-Type")
		got.Del("Content-Length")
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: headers (-want +got):\n%s", name, diff)
		}
	}
}

// Users choose names on a tailnet.
func TestPage_EscapesNames(t *testing.T) {
	const evil = `"><img src=x onerror=alert(1)></style><script>alert(1)</script>`
	f := alice()
	f.User, f.Device, f.Login, f.Proxy, f.Service, f.Address = evil, evil, evil, evil, evil, evil
	f.Groups = []whoami.Group{{Name: evil}}
	f.Cut = []whoami.Cut{{Name: evil, Option: evil}}
	f.Grants = []whoami.Grant{{Value: json.RawMessage(`"` + strings.ReplaceAll(evil, `"`, `\"`) + `"`)}, {Value: json.RawMessage(evil)}}
	f.Recording.Recorders = []string{evil}
	f.CA = &x509.Certificate{Subject: pkix.Name{CommonName: evil}}
	f.Sites = []whoami.Site{{Name: evil, Server: "https://a", User: evil}}
	_, body := get(t, f, "GET", "/whoami", browser)
	if strings.Contains(body, "<img") || strings.Contains(body, "<script") || strings.Count(body, "</style>") != 1 {
		t.Errorf("a name became markup:\n%s", body)
	}
}

func TestText_GroupsSitesThatSayTheSame(t *testing.T) {
	at := func(f *whoami.Facts, proxy string, listen ...string) *whoami.Facts {
		f.Proxy, f.Listen = proxy, listen
		return f
	}
	limited := at(alice(), "k8s", "tailscale/k8s:8443")
	limited.Groups = nil
	service := at(alice(), "k8s", "tailscale-service/k8s/k8s-api:443")
	service.Service = "k8s-api"
	var out strings.Builder
	if err := whoami.WriteText(&out,
		at(alice(), "k8s", "tailscale/k8s:443"),
		limited,
		at(alice(), "k8s", "tailscale/k8s:80", "tailscale/k8s:443"),
		at(alice(), "k8s-b", "tailscale/k8s-b:443"),
		service,
	); err != nil {
		t.Fatal(err)
	}
	var got []string
	for line := range strings.Lines(out.String()) {
		if who, says, ok := strings.Cut(line, ", says "); ok && who != "" {
			got = append(got, strings.TrimSpace(says))
		}
	}
	want := []string{
		`tailnet node "k8s" on tailscale/k8s:443, tailscale/k8s:80 and tailnet node "k8s-b" on tailscale/k8s-b:443 and tailnet node "k8s" to who dials its Tailscale Service "k8s-api" on tailscale-service/k8s/k8s-api:443`,
		`tailnet node "k8s" on tailscale/k8s:8443`,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("paragraphs (-want +got):\n%s\n%s", diff, out.String())
	}
}

// The control server chooses names and grants.
func TestText_ReplacesTerminalControls(t *testing.T) {
	const evil = "\x1b]0;owned\x07\u009b2J\x7f"
	f := whoami.Facts{Login: evil, Device: evil, Refused: evil, Tags: []string{evil}, Grants: []whoami.Grant{{Value: json.RawMessage(`"` + "\u009b2J\x7f" + `"`)}}}
	var out strings.Builder
	if err := whoami.WriteText(&out, &f); err != nil {
		t.Fatal(err)
	}
	for _, r := range out.String() {
		if r != '\n' && !strconv.IsPrint(r) {
			t.Fatalf("%q has the character %q", out.String(), r)
		}
	}
	if !strings.Contains(out.String(), "owned") {
		t.Errorf("%q does not have what can be printed", out.String())
	}
}

func TestJSON_HoldsAllFacts(t *testing.T) {
	for name, want := range map[string]*whoami.Facts{"known": alice(), "refused": dave(), "misspelt": ci()} {
		resp, body := get(t, want, "GET", "/whoami", "application/json")
		var got whoami.Facts
		if err := json.Unmarshal([]byte(body), &got); err != nil {
			t.Fatalf("%s: %v\n%s", name, err, body)
		}
		for i := range got.Grants { // the answer is indented
			var compact bytes.Buffer
			if err := json.Compact(&compact, got.Grants[i].Value); err != nil {
				t.Fatal(err)
			}
			got.Grants[i].Value = compact.Bytes()
		}
		if diff := cmp.Diff(want, &got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
		if resp.Header.Get("Content-Type") != "application/json" || (resp.StatusCode == http.StatusOK) != (want.Refused == "") {
			t.Errorf("%s: answered %s as %s", name, resp.Status, resp.Header.Get("Content-Type"))
		}
		if got.Kubeconfig == "" {
			t.Errorf("%s: no kubeconfig", name)
		}
	}
}

func TestKubeconfig_Download(t *testing.T) {
	resp, body := get(t, alice(), "GET", "/whoami?kubeconfig", browser)
	if got, want := resp.Header.Get("Content-Disposition"), `attachment; filename="k8s.example.ts.net.kubeconfig"`; got != want {
		t.Errorf("got Content-Disposition %q; want %q", got, want)
	}
	config, err := clientcmd.RESTConfigFromKubeConfig([]byte(body))
	if err != nil {
		t.Fatalf("%v\n%s", err, body)
	}
	if config.Host != "https://k8s.example.ts.net" {
		t.Errorf("got server %s", config.Host)
	}

	f := alice()
	f.Server = "https://k8s.example.ts.net/cluster-a"
	resp, _ = get(t, f, "GET", "/whoami?kubeconfig", browser)
	if got, want := resp.Header.Get("Content-Disposition"), `attachment; filename="k8s.example.ts.net-cluster-a.kubeconfig"`; got != want {
		t.Errorf("below a path: got Content-Disposition %q; want %q", got, want)
	}

	// The client chooses the name, and could end the value of the header.
	f = alice()
	f.Server = `https://a".exe;x="b`
	resp, _ = get(t, f, "GET", "/whoami?kubeconfig", browser)
	if got, want := resp.Header.Get("Content-Disposition"), `attachment; filename="a-.exe-x--b.kubeconfig"`; got != want {
		t.Errorf("got Content-Disposition %q; want %q", got, want)
	}
}

func TestServe_JSONOnlyIfAccepted(t *testing.T) {
	for accept, want := range map[string]string{
		"":                       "text/html; charset=utf-8",
		"*/*":                    "text/html; charset=utf-8",
		browser:                  "text/html; charset=utf-8",
		"application/json":       "application/json",
		"application/json, */*":  "application/json",
		"text/html":              "text/html; charset=utf-8",
		"application/json;q=0.9": "application/json",
	} {
		if resp, _ := get(t, alice(), "GET", "/whoami", accept); resp.Header.Get("Content-Type") != want {
			t.Errorf("Accept %q: got %s; want %s", accept, resp.Header.Get("Content-Type"), want)
		}
	}
	if resp, body := get(t, alice(), "HEAD", "/whoami", browser); body != "" || resp.Header.Get("Content-Length") == "0" {
		t.Errorf("HEAD: got a body of %d bytes, and the length %s", len(body), resp.Header.Get("Content-Length"))
	}
}

// A Host that makes no URL, or a long one, is refused, and not repeated in a page.
func TestServe_OddHostIsRefused(t *testing.T) {
	for _, server := range []string{"https://a%zz", "https://" + strings.Repeat("a", 1_000_000), "https://a b"} {
		f := alice()
		f.Server = server
		err := whoami.Serve(httptest.NewRecorder(), httptest.NewRequest("GET", "/whoami", nil), f)
		if apistatus.ReasonOf(err) != apistatus.Host || len(err.Error()) > 400 {
			t.Errorf("%.50s: got error %.400v; want a short refusal of the host", server, err)
		}
	}
}
