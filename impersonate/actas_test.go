// SPDX-License-Identifier: Apache-2.0

package impersonate_test

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/http/httpguts"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
)

// headers returns headers from alternating names and values, in canonical form.
func headers(pairs ...string) http.Header {
	h := make(http.Header)
	for i := 0; i < len(pairs); i += 2 {
		h.Add(pairs[i], pairs[i+1])
	}
	return h
}

func TestParseTarget_ReadsWhatTheAPIServerReads(t *testing.T) {
	longest := "system:serviceaccount:" + strings.Repeat("n", 63) + ":" + strings.Repeat("a", 253)
	for _, tt := range []struct {
		name string
		h    http.Header
		want *impersonate.Target
	}{
		{"no target", headers("Accept", "*/*", "X-Impersonate-User", "a"), nil},
		{"a user", headers("Impersonate-User", "bob"), &impersonate.Target{User: "bob"}},
		{"a user of the cluster", headers("Impersonate-User", "system:node:n1"), &impersonate.Target{User: "system:node:n1"}},
		{
			"everything", headers("impersonate-user", "bob", "Impersonate-Group", "b", "Impersonate-Group", "a", "Impersonate-Uid", "1", "Impersonate-Extra-Scopes", "x", "Impersonate-Extra-Scopes", "y"),
			&impersonate.Target{User: "bob", Groups: []string{"b", "a"}, UID: "1", Extra: map[string][]string{"scopes": {"x", "y"}}},
		},
		{"the longest service account", headers("Impersonate-User", longest), &impersonate.Target{User: longest}},
		{
			"encoded keys", headers("Impersonate-User", "bob", "Impersonate-Extra-Example.com%2FRole", "x", "Impersonate-Extra-%53copes", "y"),
			&impersonate.Target{User: "bob", Extra: map[string][]string{"example.com/role": {"x"}, "Scopes": {"y"}}},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := impersonate.ParseTarget(tt.h)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("target (-want +got):\n%s", diff)
			}
		})
	}
}

func TestParseTarget_RejectsAmbiguousHeaders(t *testing.T) {
	many := func(name string, n int, pairs ...string) http.Header {
		h := headers(append(pairs, "Impersonate-User", "bob")...)
		for i := range n {
			h.Add(name, fmt.Sprint(i))
		}
		return h
	}
	user := func(pairs ...string) http.Header { return headers(append(pairs, "Impersonate-User", "bob")...) }
	for _, tt := range []struct {
		name  string
		h     http.Header
		words []string
	}{
		{"a group without a user", headers("Impersonate-Group", "a"), []string{"without a user"}},
		{"a UID without a user", headers("Impersonate-Uid", "a"), []string{"without a user"}},
		{"extra fields without a user", headers("Impersonate-Extra-A", "a"), []string{"without a user"}},
		{"an empty user", headers("Impersonate-User", ""), []string{"Impersonate-User", "empty"}},
		{"an empty user and a group", headers("Impersonate-User", "", "Impersonate-Group", "a"), []string{"Impersonate-User", "empty"}},
		{"two users", user("Impersonate-User", "alice"), []string{"Impersonate-User", "twice"}},
		{"two UIDs", user("Impersonate-Uid", "1", "Impersonate-Uid", "2"), []string{"Impersonate-Uid", "twice"}},
		{"an empty group", user("Impersonate-Group", ""), []string{"Impersonate-Group", "empty"}},
		{"an empty value", user("Impersonate-Extra-A", ""), []string{"Impersonate-Extra-A", "empty"}},
		{"a header without values", http.Header{"Impersonate-User": {"bob"}, "Impersonate-Group": nil}, []string{"Impersonate-Group", "no value"}},
		{"a name not in ASCII", headers("Impersonate-User", "bäb"), []string{"Impersonate-User", "printable"}},
		{"a name with blanks around it", http.Header{"Impersonate-User": {" bob"}}, []string{"Impersonate-User", "blank"}},
		{"a long user", headers("Impersonate-User", strings.Repeat("a", 513)), []string{"Impersonate-User", "513 bytes", "512"}},
		{"a long group", user("Impersonate-Group", "a", "Impersonate-Group", strings.Repeat("\xff", 1_000_000)), []string{"Impersonate-Group", "1000000 bytes"}},
		{"a long UID", user("Impersonate-Uid", strings.Repeat("a", 513)), []string{"Impersonate-Uid", "513 bytes"}},
		{"a long value", user("Impersonate-Extra-A", strings.Repeat("a", 513)), []string{"Impersonate-Extra-A", "513 bytes"}},
		{"a long key", user("Impersonate-Extra-"+strings.Repeat("a", 1_000_000), "a"), []string{"Impersonate-Extra-Aaa", "[cut, 1000018 bytes]"}},
		{"a long unknown header", user("Impersonate-"+strings.Repeat("a", 300), "a"), []string{"unknown impersonation header", "[cut, 312 bytes]"}},
		{"an unknown header", user("Impersonate-Something-New", "a"), []string{"Impersonate-Something-New", "unknown impersonation header"}},
		{"an alias", user("Impersonate_Group", "a"), []string{"Impersonate_group", "unknown impersonation header"}},
		{"an alias of the user", http.Header{"Impersonate.User": {"bob"}}, []string{"Impersonate.User", "unknown impersonation header"}},
		{"another case", http.Header{"impersonate-user": {"bob"}}, []string{"impersonate-user", "unknown impersonation header"}},
		{"extra without a key", user("Impersonate-Extra-", "a"), []string{"Impersonate-Extra-", "empty"}},
		{"a key that cannot be decoded", user("Impersonate-Extra-%zz", "a"), []string{"%zz"}},
		{"a key that is not printable", user("Impersonate-Extra-A%0d%0aB", "a"), []string{"printable"}},
		{"a key in two spellings", user("Impersonate-Extra-Ab", "a", "Impersonate-Extra-%61b", "b"), []string{"ab", "twice"}},
		{"a key of the proxy", user("Impersonate-Extra-Tailscale-Impersonate.github.io%2foriginal-User", "a"), []string{"reserved for the proxy"}},
		{"a key of the proxy that is not in use", user("Impersonate-Extra-Tailscale-Impersonate%2egithub.io%2fnew", "a"), []string{"reserved for the proxy"}},
		{"a key of the proxy in upper case", user("Impersonate-Extra-%54ailscale-impersonate.github.io%2fnode", "a"), []string{"reserved for the proxy"}},
		{"too many groups", many("Impersonate-Group", 64), []string{"65 values", "64"}},
		{"too many, with a UID", many("Impersonate-Group", 63, "Impersonate-Uid", "1"), []string{"65 values", "64"}},
		{"too many values of an extra field", many("Impersonate-Extra-A", 64), []string{"65 values", "64"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := impersonate.ParseTarget(tt.h)
			if got != nil {
				t.Errorf("got %+v; want no target", got)
			}
			if err == nil {
				t.Fatal("got no error")
			}
			for _, word := range tt.words {
				if !strings.Contains(err.Error(), word) {
					t.Errorf("got error %q; want one that mentions %q", err, word)
				}
			}
		})
	}
}

func TestAs_NamesTheCallerInExtraFields(t *testing.T) {
	caller := &impersonate.Identity{
		User: "alice@example.com", Groups: []string{"readers"}, UID: "42", Node: "laptop.example.ts.net", Source: impersonate.SourceGrants, RequestID: "f00",
		Extra: map[string][]string{impersonate.ExtraAddress: {"100.64.0.2"}, impersonate.ExtraNode: {"laptop.example.ts.net"}},
		ActAs: &impersonate.ActAsRequest{},
	}
	// ParseTarget accepts no target with an address. If it did, the caller's would win.
	target := &impersonate.Target{User: "bob", UID: "7", Extra: map[string][]string{"scopes": {"x"}, impersonate.ExtraAddress: {"100.64.0.9"}}}
	want := &impersonate.Identity{
		User: "bob", Groups: []string{"g"}, UID: "7", Node: "laptop.example.ts.net", Source: impersonate.SourceGrants, RequestID: "f00",
		Extra: map[string][]string{
			"scopes":                        {"x"},
			impersonate.ExtraAddress:        {"100.64.0.2"},
			impersonate.ExtraNode:           {"laptop.example.ts.net"},
			impersonate.ExtraOriginalUser:   {"alice@example.com"},
			impersonate.ExtraOriginalGroups: {"readers"},
			impersonate.ExtraOriginalUID:    {"42"},
		},
	}
	if diff := cmp.Diff(want, caller.As(target, []string{"g"})); diff != "" {
		t.Errorf("identity (-want +got):\n%s", diff)
	}
	if len(target.Extra) != 2 || len(caller.Extra) != 2 {
		t.Errorf("the target or the caller was changed: %v, %v", target.Extra, caller.Extra)
	}

	plain := (&impersonate.Identity{User: "alice@example.com", Node: "laptop"}).As(&impersonate.Target{User: "bob"}, nil)
	want = &impersonate.Identity{User: "bob", Node: "laptop", Extra: map[string][]string{
		impersonate.ExtraOriginalUser: {"alice@example.com"}, impersonate.ExtraNode: {"laptop"},
	}}
	if diff := cmp.Diff(want, plain); diff != "" {
		t.Errorf("identity without audit (-want +got):\n%s", diff)
	}
}

func TestTarget_OwnGroups(t *testing.T) {
	for _, tt := range []struct {
		target impersonate.Target
		want   []string
	}{
		{impersonate.Target{User: "bob"}, nil},
		{impersonate.Target{User: "system:serviceaccount:ns:sa"}, []string{"system:serviceaccounts", "system:serviceaccounts:ns"}},
		{impersonate.Target{User: "system:serviceaccount:ns:sa", Groups: []string{"a"}}, []string{"system:serviceaccounts", "system:serviceaccounts:ns"}},
		{impersonate.Target{User: "system:serviceaccount:ns"}, nil},
		{impersonate.Target{User: "system:node:n1"}, []string{"system:nodes"}},
		{impersonate.Target{User: "system:node:N_1"}, nil},
		{impersonate.Target{User: "system:node:n1", Groups: []string{"a"}}, []string{"system:nodes"}},
	} {
		if diff := cmp.Diff(tt.want, tt.target.OwnGroups()); diff != "" {
			t.Errorf("%+v (-want +got):\n%s", tt.target, diff)
		}
	}
}

func TestTarget_NamesOfServiceAccountAndNode(t *testing.T) {
	account := impersonate.Target{User: "system:serviceaccount:ns:sa"}
	if namespace, name, ok := account.ServiceAccount(); namespace != "ns" || name != "sa" || !ok {
		t.Errorf("got service account %q, %q, %t", namespace, name, ok)
	}
	node := impersonate.Target{User: "system:node:n1"}
	if name, ok := node.NodeName(); name != "n1" || !ok {
		t.Errorf("got node %q, %t", name, ok)
	}
}

func TestParseTarget_ErrorIsTheSameEachTime(t *testing.T) {
	for range 50 { // maps have no order
		_, err := impersonate.ParseTarget(http.Header{"Impersonate-User": {""}, "Impersonate-Uid": {""}, "Impersonate-Group": {""}, "Impersonate-X": {"a"}})
		if err == nil || !strings.Contains(err.Error(), "Impersonate-Group") {
			t.Fatalf("got error %v; want one about Impersonate-Group", err)
		}
	}
	_, err := impersonate.ParseTarget(headers("Impersonate-User", "bob", "Impersonate-Extra-%zz", "a"))
	if err == nil || !strings.Contains(err.Error(), "invalid URL escape") {
		t.Errorf("got error %v; want one about the escape", err)
	}
}

// Constrained impersonation of a service account or node allows nothing but a user.
func TestTarget_OnlyUser(t *testing.T) {
	for _, tt := range []struct {
		target impersonate.Target
		want   bool
	}{
		{impersonate.Target{User: "bob"}, true},
		{impersonate.Target{User: "bob", Groups: []string{}, Extra: map[string][]string{}}, true},
		{impersonate.Target{User: "bob", UID: "1"}, false},
		{impersonate.Target{User: "bob", Groups: []string{"a"}}, false},
		{impersonate.Target{User: "bob", Extra: map[string][]string{"scopes": {"x"}}}, false},
	} {
		if got := tt.target.OnlyUser(); got != tt.want {
			t.Errorf("%+v: got %v; want %v", tt.target, got, tt.want)
		}
	}
}

// Until the API server has authorized it, no HTTP client sends a request to act as
// another user: neither as the caller nor as the target.
func TestSetHeaders_UnauthorizedActAsCannotBeSent(t *testing.T) {
	id := &impersonate.Identity{User: "alice@example.com", Groups: []string{"system:masters"}, ActAs: &impersonate.ActAsRequest{Target: &impersonate.Target{User: "bob"}}}
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		t.Errorf("a request arrived over %s, with %v", r.Proto, r.Header)
	}))
	server.EnableHTTP2 = true
	server.StartTLS()
	defer server.Close()
	for _, http2 := range []bool{false, true} {
		transport := server.Client().Transport.(*http.Transport).Clone()
		transport.ForceAttemptHTTP2 = http2
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, server.URL, nil)
		if err != nil {
			t.Fatal(err)
		}
		id.SetHeaders(r.Header)
		for _, name := range []string{"Impersonate-User", "Impersonate-Group"} {
			if r.Header[name] != nil {
				t.Errorf("got %s %q; want none", name, r.Header[name])
			}
		}
		resp, err := transport.RoundTrip(r)
		if err == nil {
			_, _ = io.Copy(io.Discard, resp.Body)
			_ = resp.Body.Close()
			t.Error("the request was sent")
		}
		id.RemoveHeaders(r.Header)
		if len(r.Header) > 0 {
			t.Errorf("headers left: %v", r.Header)
		}
		transport.CloseIdleConnections()
	}
}

// The client chooses how long each value is, and would have the API server receive it.
func TestParseTarget_LongValues(t *testing.T) {
	for _, tt := range []struct {
		name string
		set  func(h http.Header, value string)
		max  int
	}{
		{"user", func(h http.Header, value string) { h["Impersonate-User"] = []string{value} }, 512},
		{"UID", func(h http.Header, value string) { h["Impersonate-Uid"] = []string{value} }, 512},
		{"group", func(h http.Header, value string) { h["Impersonate-Group"] = []string{"a", value} }, 512},
		{"extra", func(h http.Header, value string) { h["Impersonate-Extra-Scopes"] = []string{"a", value} }, 512},
		{"key", func(h http.Header, value string) { h["Impersonate-Extra-"+value] = []string{"a"} }, 512 - len("Impersonate-Extra-")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, n := range []int{tt.max, tt.max + 1, 450_000} {
				h := http.Header{"Impersonate-User": {"bob"}}
				tt.set(h, strings.Repeat("a", n))
				target, err := impersonate.ParseTarget(h)
				if accepted := n <= tt.max; (err == nil) != accepted || (target != nil) != accepted {
					t.Errorf("%d bytes: got error %.200v; want it accepted: %v", n, err, accepted)
				}
				if err != nil && len(err.Error()) > 400 {
					t.Errorf("%d bytes: the error has %d", n, len(err.Error()))
				}
			}
		})
	}
}

// FuzzParseTarget checks that for all headers of clients, ParseTarget returns an error,
// or the same target that the API server reads from the headers that SetHeaders writes.
func FuzzParseTarget(f *testing.F) {
	f.Add("bob", "a\nb", "1", "Scopes", "x\ny")
	f.Add("system:serviceaccount:ns:sa", "", "", "Example.com%2FRole", "x")
	f.Add("bob", "system:masters", "", "%54ailscale-impersonate.github.io%2fnode", "x")
	f.Add("", "a", "", "", "")
	f.Add("b\x00b", " a", "\u00e9", "%zz", "")
	f.Fuzz(func(t *testing.T, user, groups, uid, key, values string) {
		h := make(http.Header)
		set := func(name, values string) {
			if values != "" {
				h[http.CanonicalHeaderKey(name)] = strings.Split(values, "\n")
			}
		}
		set("Impersonate-User", user)
		set("Impersonate-Group", groups)
		set("Impersonate-Uid", uid)
		if key != "" {
			set("Impersonate-Extra-"+key, values)
		}
		target, err := impersonate.ParseTarget(h)
		if err != nil || target == nil {
			if target != nil {
				t.Errorf("got %+v along with %v", target, err)
			}
			return
		}
		sent := make(http.Header)
		(&impersonate.Identity{User: "alice@example.com"}).As(target, target.Groups).SetHeaders(sent)
		got := &impersonate.Target{User: sent.Get("Impersonate-User"), UID: sent.Get("Impersonate-Uid"), Groups: sent["Impersonate-Group"]}
		for name, values := range sent {
			for _, value := range values {
				if !httpguts.ValidHeaderFieldName(name) || !httpguts.ValidHeaderFieldValue(value) || strings.TrimSpace(value) != value {
					t.Errorf("%s: %q is not what a header carries", name, value)
				}
			}
			if strings.HasPrefix(name, "Impersonate-Extra-") && decodeExtra(t, name) != impersonate.ExtraOriginalUser {
				got.Extra = map[string][]string{decodeExtra(t, name): values}
			}
		}
		if diff := cmp.Diff(target, got); diff != "" {
			t.Errorf("what is sent (-understood +sent):\n%s", diff)
		}
		if got := sent.Get("Impersonate-User"); got != user {
			t.Errorf("sent as %q; want %q", got, user)
		}
	})
}
