// SPDX-License-Identifier: Apache-2.0

package impersonate_test

import (
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/http/httpguts"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
)

// spellings returns the name of a header in forms that servers behind the proxy may
// treat as equal. They are raw keys and not canonical.
func spellings(name string) []string {
	return []string{
		name,
		strings.ToLower(name),
		strings.ToUpper(name),
		strings.ReplaceAll(name, "-", "_"),
		strings.ReplaceAll(name, "-", "."),
		strings.ToLower(strings.ReplaceAll(name, "-", "_")),
		strings.ToUpper(strings.ReplaceAll(name, "-", ".")),
		strings.Replace(name, "-", "_", 1),
		strings.Replace(name, "-", ".", 1),
		strings.ToLower(name[:1]) + name[1:],
		name[:len(name)-1] + strings.ToUpper(name[len(name)-1:]),
	}
}

var strips = map[string]func(http.Header) string{
	"StripClient":    impersonate.StripClient,
	"StripProtected": impersonate.StripProtected,
}

func TestStrip_ImpersonationHeadersByPrefix(t *testing.T) {
	for function, strip := range strips {
		for _, header := range []string{
			"Impersonate-User",
			"Impersonate-Group",
			"Impersonate-Uid",
			"Impersonate-Extra-Scopes",
			"Impersonate-Extra-Acme.com%2fproject",
			"Impersonate-Something", // a header that Kubernetes may add
			"Impersonate-User-Info",
			"Impersonate-",
		} {
			for _, name := range spellings(header) {
				t.Run(function+"/"+name, func(t *testing.T) {
					h := http.Header{name: {"a", "b"}, "Accept": {"*/*"}}
					if got := strip(h); got != name {
						t.Errorf("got removed header %q; want %q", got, name)
					}
					if diff := cmp.Diff(http.Header{"Accept": {"*/*"}}, h); diff != "" {
						t.Errorf("headers left (-want +got):\n%s", diff)
					}
				})
			}
		}
	}
}

func TestStrip_OtherCredentials(t *testing.T) {
	for function, strip := range strips {
		for _, header := range []string{
			"Authorization",
			"X-Remote-User",
			"X-Remote-Group",
			"X-Remote-Uid",
			"X-Remote-Extra-Scopes",
			"X-Remote-Something",
		} {
			for _, name := range spellings(header) {
				t.Run(function+"/"+name, func(t *testing.T) {
					h := http.Header{name: {"a", "b"}, "Accept": {"*/*"}}
					if got := strip(h); got != "" {
						t.Errorf("got removed impersonation header %q; want none", got)
					}
					if diff := cmp.Diff(http.Header{"Accept": {"*/*"}}, h); diff != "" {
						t.Errorf("headers left (-want +got):\n%s", diff)
					}
				})
			}
		}
	}
}

// With Incremental, Caddy drops the body of a DELETE of unknown length. The recorded
// body may say that it is a dry run.
func TestStripClient_RemovesAddressAndIncremental(t *testing.T) {
	for _, name := range append(spellings("X-Real-Ip"), spellings("Incremental")...) {
		t.Run(name, func(t *testing.T) {
			h := http.Header{name: {"192.0.2.1"}, "Accept": {"*/*"}}
			impersonate.StripClient(h)
			if diff := cmp.Diff(http.Header{"Accept": {"*/*"}}, h); diff != "" {
				t.Errorf("headers left (-want +got):\n%s", diff)
			}
		})
	}
}

func TestStrip_AllSpellingsAtOnce(t *testing.T) {
	for function, strip := range strips {
		t.Run(function, func(t *testing.T) {
			h := http.Header{"Accept": {"*/*"}}
			for _, header := range []string{"Impersonate-User", "Impersonate-Group", "X-Remote-User", "Authorization"} {
				for _, name := range spellings(header) {
					h[name] = []string{"system:masters"}
				}
			}
			if got := strip(h); !strings.HasPrefix(strings.ToLower(got), "impersonate") {
				t.Errorf("got removed header %q; want an impersonation header", got)
			}
			if diff := cmp.Diff(http.Header{"Accept": {"*/*"}}, h); diff != "" {
				t.Errorf("headers left (-want +got):\n%s", diff)
			}
		})
	}
}

func TestStrip_ReportsOnlyImpersonationHeaders(t *testing.T) {
	for function, strip := range strips {
		h := http.Header{"Authorization": {"Bearer x"}, "X-Remote-User": {"x"}, "Accept": {"*/*"}}
		if got := strip(h); got != "" {
			t.Errorf("%s: got removed impersonation header %q; want none", function, got)
		}
	}
}

func TestStripClient_KeepsOtherHeaders(t *testing.T) {
	h := http.Header{
		"Accept":                          {"application/json;as=Table;v=v1;g=meta.k8s.io", "*/*"},
		"Accept-Encoding":                 {"gzip"},
		"Authorization-Info":              {"a"},
		"Authorizations":                  {"a"},
		"Connections":                     {"a"},
		"Content-Type":                    {"application/apply-patch+yaml"},
		"Cookie":                          {"a=b"},
		"Impersonate":                     {"a"},
		"Impersonated-By":                 {"a"},
		"Kubectl-Command":                 {"kubectl get"},
		"Kubectl-Session":                 {"a"},
		"Proxy-Connection":                {"Impersonate-User"},
		"Sec-Websocket-Key":               {"a"},
		"Sec-Websocket-Protocol-Versions": {"base64url.bearer.authorization.k8s.io.dG9rZW4"},
		"Upgrade":                         {"SPDY/3.1"},
		"User-Agent":                      {"kubectl/v1.37.2"},
		"X-Impersonate-User":              {"a"},
		"X-Real-Ip-Other":                 {"a"},
		"X-Remote":                        {"a"},
		"X-Stream-Protocol-Version":       {"v4.channel.k8s.io", "v3.channel.k8s.io"},
	}
	want := h.Clone()
	if got := impersonate.StripClient(h); got != "" {
		t.Errorf("got removed header %q; want none", got)
	}
	if diff := cmp.Diff(want, h); diff != "" {
		t.Errorf("headers (-want +got):\n%s", diff)
	}
}

// A token in a WebSocket's list of subprotocols would be a second credential.
func TestStrip_BearerTokenOfWebSocket(t *testing.T) {
	const bearer = "base64url.bearer.authorization.k8s.io.dG9rZW4"
	for _, tt := range []struct {
		name        string
		lines, want []string
	}{
		{"alone", []string{bearer}, nil},
		{"first", []string{bearer + ", v5.channel.k8s.io"}, []string{"v5.channel.k8s.io"}},
		{"last", []string{"v5.channel.k8s.io," + bearer}, []string{"v5.channel.k8s.io"}},
		{"between, order is kept", []string{"v5.channel.k8s.io, " + bearer + " ,v4.channel.k8s.io,channel.k8s.io"}, []string{"v5.channel.k8s.io, v4.channel.k8s.io, channel.k8s.io"}},
		{"on a line of its own", []string{"v5.channel.k8s.io", bearer, "v4.channel.k8s.io"}, []string{"v5.channel.k8s.io, v4.channel.k8s.io"}},
		{"on every line", []string{bearer + ",v5.channel.k8s.io", "v4.channel.k8s.io,\t" + bearer}, []string{"v5.channel.k8s.io, v4.channel.k8s.io"}},
		{"twice", []string{bearer + "," + bearer, bearer}, nil},
		{"without a token", []string{"base64url.bearer.authorization.k8s.io.,v5.channel.k8s.io"}, []string{"v5.channel.k8s.io"}},
		{"in upper case", []string{strings.ToUpper(bearer) + ",v5.channel.k8s.io"}, []string{"v5.channel.k8s.io"}},
		{"odd spacing", []string{"  v5.channel.k8s.io ,\t " + bearer + "\t "}, []string{"v5.channel.k8s.io"}},
		{"none: left as it was", []string{"v5.channel.k8s.io,v4.channel.k8s.io", " channel.k8s.io"}, []string{"v5.channel.k8s.io,v4.channel.k8s.io", " channel.k8s.io"}},
		{"similar: left as it was", []string{"base64url.bearer.authorization.k8s.io", "x" + bearer}, []string{"base64url.bearer.authorization.k8s.io", "x" + bearer}},
	} {
		for function, strip := range strips {
			for _, name := range spellings("Sec-Websocket-Protocol") {
				t.Run(tt.name+"/"+function+"/"+name, func(t *testing.T) {
					h := http.Header{name: append([]string(nil), tt.lines...), "Accept": {"*/*"}}
					want := http.Header{"Accept": {"*/*"}}
					if tt.want != nil {
						want[name] = tt.want
					}
					if got := strip(h); got != "" {
						t.Errorf("got removed impersonation header %q; want none", got)
					}
					if diff := cmp.Diff(want, h); diff != "" {
						t.Errorf("headers (-want +got):\n%s", diff)
					}
				})
			}
		}
	}
}

// reductions are the functions that remove everything from Connection but an upgrade.
var reductions = map[string]func(http.Header){
	"StripClient":      func(h http.Header) { impersonate.StripClient(h) },
	"ReduceConnection": impersonate.ReduceConnection,
}

// reverse_proxy deletes every header that Connection names, ours included.
func TestConnection_ReducedToUpgrade(t *testing.T) {
	upgrade := []string{"Upgrade"}
	for _, tt := range []struct {
		name        string
		lines, want []string
	}{
		{"upgrade", []string{"Upgrade"}, upgrade},
		{"upgrade in lower case", []string{"upgrade"}, upgrade},
		{"upgrade in upper case, odd spacing", []string{" \tUPGRADE "}, upgrade},
		{"keep-alive", []string{"keep-alive"}, nil},
		{"close", []string{"close"}, nil},
		{"empty", []string{""}, nil},
		{"our headers", []string{"Impersonate-User, Impersonate-Group"}, nil},
		{"our headers on several lines", []string{"Impersonate-User", "impersonate-group", "Authorization"}, nil},
		{"our headers with an upgrade", []string{"Upgrade, Impersonate-User"}, upgrade},
		{"our headers behind an upgrade", []string{"Upgrade", "Impersonate-User,Impersonate-Extra-Scopes"}, upgrade},
		{"our headers before an upgrade", []string{"Impersonate-User", "IMPERSONATE-GROUP ,\t uPgRaDe"}, upgrade},
		{"odd spacing", []string{"\t impersonate-user\t,, ,Upgrade,"}, upgrade},
		{"tokens that only start with upgrade", []string{"Upgrade-Insecure-Requests", "Upgrades"}, nil},
	} {
		for function, reduce := range reductions {
			for _, name := range []string{"Connection", "connection", "CONNECTION"} {
				t.Run(tt.name+"/"+function+"/"+name, func(t *testing.T) {
					h := http.Header{name: tt.lines, "Upgrade": {"websocket"}}
					want := http.Header{"Upgrade": {"websocket"}}
					if tt.want != nil {
						want["Connection"] = tt.want
					}
					reduce(h)
					if diff := cmp.Diff(want, h); diff != "" {
						t.Errorf("headers (-want +got):\n%s", diff)
					}
				})
			}
		}
	}
}

func TestConnection_ReducedInSeveralSpellings(t *testing.T) {
	for function, reduce := range reductions {
		// Several times, as the order of a map varies.
		for range 20 {
			h := http.Header{"Connection": {"Impersonate-User"}, "connection": {"upgrade"}, "CONNECTION": {"Impersonate-Group"}}
			reduce(h)
			if diff := cmp.Diff(http.Header{"Connection": {"Upgrade"}}, h); diff != "" {
				t.Fatalf("%s: headers (-want +got):\n%s", function, diff)
			}
		}
	}
}

func TestStripProtected_KeepsConnection(t *testing.T) {
	h := http.Header{"Connection": {"Upgrade"}, "Upgrade": {"websocket"}, "X-Real-Ip": {"192.0.2.1"}}
	want := h.Clone()
	impersonate.StripProtected(h)
	if diff := cmp.Diff(want, h); diff != "" {
		t.Errorf("headers (-want +got):\n%s", diff)
	}
}

func TestSetHeaders_WritesExactlyTheIdentity(t *testing.T) {
	for _, tt := range []struct {
		name string
		id   impersonate.Identity
		want http.Header
	}{
		{
			"user", impersonate.Identity{User: "alice@example.com", Source: impersonate.SourceNone, Node: "laptop.example.ts.net"},
			http.Header{"Impersonate-User": {"alice@example.com"}},
		},
		{
			"user without groups, in a list", impersonate.Identity{User: "alice@example.com", Groups: []string{}},
			http.Header{"Impersonate-User": {"alice@example.com"}},
		},
		{
			"user and groups", impersonate.Identity{User: "alice@example.com", Groups: []string{"b", "a, c", "{env.SECRET}"}},
			http.Header{"Impersonate-User": {"alice@example.com"}, "Impersonate-Group": {"b", "a, c", "{env.SECRET}"}},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := http.Header{"Accept": {"*/*"}}
			tt.want["Accept"] = []string{"*/*"}
			tt.id.SetHeaders(h)
			if diff := cmp.Diff(tt.want, h); diff != "" {
				t.Errorf("headers (-want +got):\n%s", diff)
			}
		})
	}
}

func TestSetHeaders_ReplacesValues(t *testing.T) {
	h := http.Header{"Impersonate-User": {"system:admin"}, "Impersonate-Group": {"system:masters"}}
	(&impersonate.Identity{User: "alice@example.com", Groups: []string{"tailnet-readers"}}).SetHeaders(h)
	want := http.Header{"Impersonate-User": {"alice@example.com"}, "Impersonate-Group": {"tailnet-readers"}}
	if diff := cmp.Diff(want, h); diff != "" {
		t.Errorf("headers (-want +got):\n%s", diff)
	}
	(&impersonate.Identity{User: "bob@example.com"}).SetHeaders(h)
	want = http.Header{"Impersonate-User": {"bob@example.com"}}
	if diff := cmp.Diff(want, h); diff != "" {
		t.Errorf("headers of a user without groups (-want +got):\n%s", diff)
	}
}

// Header operations of a config edit values in place. They must not change the identity,
// which transport kubernetes writes again.
func TestSetHeaders_DoesNotShareMemory(t *testing.T) {
	made := func() impersonate.Identity {
		return impersonate.Identity{User: "alice@example.com", Groups: []string{"tailnet-readers"}, Extra: map[string][]string{"tags": {"tag:a"}}}
	}
	id, want := made(), made()
	h := make(http.Header)
	id.SetHeaders(h)
	h["Impersonate-Group"][0] = "system:masters"
	h["Impersonate-User"][0] = "system:admin"
	h["Impersonate-Extra-Tags"][0] = "tag:admin"
	if diff := cmp.Diff(want, id, equateAddrs); diff != "" {
		t.Errorf("identity after the headers were edited (-want +got):\n%s", diff)
	}
	id.SetHeaders(h)
	h.Add("Impersonate-User", "system:admin")
	if diff := cmp.Diff([]string{"tailnet-readers"}, h["Impersonate-Group"]); diff != "" {
		t.Errorf("groups after a user was added (-want +got):\n%s", diff)
	}
}

// FuzzStripClient checks that for all headers of clients, the headers that are sent hold
// the identity, no other identity in any spelling, no credentials, and no Connection that
// removes headers. All other headers must be unchanged.
//
// The fuzzed text has one raw header per line, with a colon between name and value.
// Names and values that net/http would reject are skipped.
func FuzzStripClient(f *testing.F) {
	f.Add("Connection: Impersonate-User, Impersonate-Group\nImpersonate-User: system:admin")
	f.Add("connection:\t Impersonate-User ,upgrade\nConnection: Authorization\nUpgrade: websocket")
	f.Add("impersonate_user: x\nIMPERSONATE.GROUP: system:masters\nImpersonate-Something: x")
	f.Add("Authorization: Bearer x\nX_Remote.User: x\nx-real-ip: 192.0.2.1")
	f.Add("Sec-WebSocket-Protocol: v5.channel.k8s.io, base64url.bearer.authorization.k8s.io.eA\nSec-WebSocket-Protocol: base64url.bearer.authorization.k8s.io.eQ,v4")
	f.Add("Accept: */*\nKubectl-Command: kubectl get\nImpersonated: x")
	f.Add("X-Forwarded-For: 192.0.2.1\nx_forwarded.host: x\nForwarded: for=192.0.2.1\nAudit-ID: x\nForwarded-For: kept")

	id := impersonate.Identity{User: "alice@example.com", Groups: []string{"tailnet-readers", "tag:x"}}
	identity := http.Header{"Impersonate-User": {"alice@example.com"}, "Impersonate-Group": {"tailnet-readers", "tag:x"}}
	fold := strings.NewReplacer("_", "-", ".", "-")

	f.Fuzz(func(t *testing.T, text string) {
		h := make(http.Header)
		for line := range strings.Lines(text) {
			name, value, _ := strings.Cut(strings.TrimRight(line, "\r\n"), ":")
			if httpguts.ValidHeaderFieldName(name) && httpguts.ValidHeaderFieldValue(value) {
				h[name] = append(h[name], value)
			}
		}
		sent := h.Clone()

		impersonate.StripClient(h)
		id.SetHeaders(h)

		got := make(http.Header)
		for name, values := range h {
			folded := fold.Replace(strings.ToLower(name))
			switch {
			case strings.HasPrefix(folded, "impersonate-"):
				got[name] = values
			case strings.HasPrefix(folded, "x-remote-"), folded == "authorization", auditable(folded):
				t.Errorf("header %q is left", name)
			case folded == "connection":
				if diff := cmp.Diff(http.Header{"Connection": {"Upgrade"}}, http.Header{name: values}); diff != "" {
					t.Errorf("Connection (-want +got):\n%s", diff)
				}
			case folded == "sec-websocket-protocol":
				want := notBearer(sent[name])
				if diff := cmp.Diff(want, notBearer(values)); diff != "" {
					t.Errorf("subprotocols (-want +got):\n%s", diff)
				}
				if len(protocols(values)) != len(want) {
					t.Errorf("got subprotocols %q; want no bearer token", values)
				}
			default:
				if diff := cmp.Diff(sent[name], values); diff != "" {
					t.Errorf("header %q was changed (-sent +got):\n%s", name, diff)
				}
			}
			delete(sent, name)
		}
		if diff := cmp.Diff(identity, got); diff != "" {
			t.Errorf("identity (-want +got):\n%s", diff)
		}
		for name := range sent {
			folded := fold.Replace(strings.ToLower(name))
			switch {
			case strings.HasPrefix(folded, "impersonate-"), strings.HasPrefix(folded, "x-remote-"):
			case folded == "authorization", folded == "connection", folded == "incremental", auditable(folded):
			case folded == "sec-websocket-protocol" && len(notBearer(sent[name])) == 0:
			default:
				t.Errorf("header %q is lost", name)
			}
		}
	})
}

// auditable reports whether the API server writes the header with this folded name to
// its audit log.
func auditable(folded string) bool {
	return strings.HasPrefix(folded, "x-forwarded-") || folded == "forwarded" || folded == "x-real-ip" || folded == "audit-id"
}

// protocols returns the entries of Sec-WebSocket-Protocol as the API server reads them.
func protocols(lines []string) []string {
	var all []string
	for _, line := range lines {
		for protocol := range strings.SplitSeq(line, ",") {
			all = append(all, strings.TrimSpace(protocol))
		}
	}
	return all
}

// notBearer returns the entries that are not a bearer token in any spelling.
func notBearer(lines []string) []string {
	var kept []string
	for _, protocol := range protocols(lines) {
		folded := strings.NewReplacer("_", "-", ".", "-").Replace(strings.ToLower(protocol))
		if !strings.HasPrefix(folded, "base64url-bearer-authorization-k8s-io-") {
			kept = append(kept, protocol)
		}
	}
	return kept
}

func BenchmarkHeaders(b *testing.B) {
	id := impersonate.Identity{User: "alice@example.com", Groups: []string{"tailnet-readers", "system:masters"}}
	h := http.Header{
		"Accept":          {"application/json;as=Table;v=v1;g=meta.k8s.io,application/json"},
		"Accept-Encoding": {"gzip"},
		"Connection":      {"keep-alive"},
		"Kubectl-Command": {"kubectl get"},
		"Kubectl-Session": {"5a1d3f5e-5b0e-4f0a-9d0c-2f8e9a7b6c5d"},
		"User-Agent":      {"kubectl/v1.37.2 (linux/amd64) kubernetes/0000000"},
	}
	b.ReportAllocs()
	for b.Loop() {
		impersonate.StripClient(h)
		id.SetHeaders(h)
	}
}

func TestStrip_ReportsTheFirstImpersonationHeader(t *testing.T) {
	for range 50 { // maps have no order
		h := headers("Impersonate-User", "a", "Impersonate-Group", "b", "Impersonate-Uid", "c", "Impersonate-Extra-X", "d")
		if got := impersonate.StripProtected(h); got != "Impersonate-Extra-X" {
			t.Fatalf("got %s; want Impersonate-Extra-X", got)
		}
	}
}

func TestStripFrontProxy_RemovesNothingElse(t *testing.T) {
	h := http.Header{"X-Remote-User": {"a"}, "x_remote.group": {"b"}, "X-Remote-Extra-A": {"c"}, "X-Requested-With": {"d"}, "Impersonate-User": {"e"}}
	impersonate.StripFrontProxy(h)
	if diff := cmp.Diff(http.Header{"X-Requested-With": {"d"}, "Impersonate-User": {"e"}}, h); diff != "" {
		t.Errorf("headers (-want +got):\n%s", diff)
	}
}

func TestRemoveHeaders_RemovesWhatIsSet(t *testing.T) {
	for _, id := range []*impersonate.Identity{
		{User: "alice", Groups: []string{"a", "b"}, UID: "1", Extra: map[string][]string{impersonate.ExtraNode: {"laptop"}}, RequestID: "2"},
		{User: "alice"},
		{User: "alice", ActAs: &impersonate.ActAsRequest{}},
	} {
		h := headers("Accept", "*/*")
		id.SetHeaders(h)
		id.RemoveHeaders(h)
		if diff := cmp.Diff(headers("Accept", "*/*"), h); diff != "" {
			t.Errorf("%+v: headers (-want +got):\n%s", id, diff)
		}
	}
}
