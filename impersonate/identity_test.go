// SPDX-License-Identifier: Apache-2.0

package impersonate_test

import (
	"bufio"
	"bytes"
	"net/http"
	"net/netip"
	"net/textproto"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"tailscale.com/client/tailscale/apitype"
	"tailscale.com/kube/kubetypes"
	"tailscale.com/tailcfg"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
)

var equateAddrs = cmpopts.EquateComparable(netip.AddrPort{})

// identityOf returns the identity of the peer that who describes, by the default
// capabilities.
func identityOf(who *apitype.WhoIsResponse) (impersonate.Identity, error) {
	peer, err := impersonate.PeerFrom(who)
	if err != nil {
		return impersonate.Identity{}, err
	}
	id, _, err := peer.Identity(impersonate.Capabilities)
	return id, err
}

// refused fails t unless id is zero and err mentions all of mentions.
func refused(t *testing.T, id impersonate.Identity, err error, mentions ...string) {
	t.Helper()
	if diff := cmp.Diff(impersonate.Identity{}, id, equateAddrs); diff != "" {
		t.Errorf("got an identity; want the zero one (-want +got):\n%s", diff)
	}
	if err == nil {
		t.Error("got no error; want one")
		return
	}
	for _, mention := range mentions {
		if !strings.Contains(err.Error(), mention) {
			t.Errorf("got error %q; want one that mentions %q", err, mention)
		}
	}
}

// The table in the comment of Identity.
func TestIdentity_UserAndGroups(t *testing.T) {
	const (
		readers    = `{"impersonate":{"groups":["tailnet-readers"]}}`
		both       = `{"impersonate":{"groups":["tailnet-readers","tailnet-writers"]}}`
		writers    = `{"impersonate":{"groups":["tailnet-writers","tailnet-writers"]}}`
		masters    = `{"impersonate":{"groups":["system:masters"]}}`
		nothing    = `{}`
		noGroups   = `{"impersonate":{}}`
		listless   = `{"impersonate":{"groups":[]}}`
		nullGroups = `{"impersonate":{"groups":null}}`
		null       = `null`
	)
	ci := func(grants ...string) *apitype.WhoIsResponse {
		return aDevice("ci.example.ts.net.", []string{"tag:ci", "tag:k8s-readers"}, grants...)
	}
	const alice = "alice@example.com"
	const ciName = "ci.example.ts.net"
	tags := []string{"tag:ci", "tag:k8s-readers"}

	for _, tt := range []struct {
		name   string
		who    *apitype.WhoIsResponse
		user   string
		groups []string
		source impersonate.Source
	}{
		{"user without a grant", aUser(alice), alice, nil, impersonate.SourceNone},
		{"user with a grant without groups", aUser(alice, nothing, noGroups, listless, nullGroups, null), alice, nil, impersonate.SourceNone},
		{"user with a grant", aUser(alice, readers), alice, []string{"tailnet-readers"}, impersonate.SourceGrants},
		{"user with several grants has the union, in the order first seen, each once", aUser(alice, readers, nothing, both, writers, readers), alice, []string{"tailnet-readers", "tailnet-writers"}, impersonate.SourceGrants},
		{"user with a grant of a system group", aUser(alice, masters), alice, []string{"system:masters"}, impersonate.SourceGrants},

		{"tagged device without a grant", ci(), ciName, tags, impersonate.SourceTags},
		{"tagged device with a grant without groups", ci(nothing, noGroups, listless, nullGroups, null), ciName, tags, impersonate.SourceTags},
		{"tagged device with a grant has those groups only", ci(readers), ciName, []string{"tailnet-readers"}, impersonate.SourceGrants},
		{"tagged device with several grants", ci(writers, both), ciName, []string{"tailnet-writers", "tailnet-readers"}, impersonate.SourceGrants},

		{"user shared in", sharedIn(aUser("bob@example.org", readers)), "bob@example.org", []string{"tailnet-readers"}, impersonate.SourceGrants},
		{"tagged device shared in has no tags as groups", sharedIn(ci()), ciName, nil, impersonate.SourceNone},
		{"tagged device shared in, with a grant without groups, has no tags as groups", sharedIn(ci(nothing)), ciName, nil, impersonate.SourceNone},
		{"tagged device shared in with a grant has those groups only", sharedIn(ci(readers)), ciName, []string{"tailnet-readers"}, impersonate.SourceGrants},
	} {
		t.Run(tt.name, func(t *testing.T) {
			id, err := identityOf(tt.who)
			if err != nil {
				t.Fatal(err)
			}
			want := impersonate.Identity{
				User:   tt.user,
				Groups: tt.groups,
				Source: tt.source,
				Node:   strings.TrimSuffix(tt.who.Node.Name, "."),
			}
			if diff := cmp.Diff(want, id, equateAddrs); diff != "" {
				t.Errorf("identity (-want +got):\n%s", diff)
			}
		})
	}
}

func TestCapabilities_DefaultNames(t *testing.T) {
	want := []tailcfg.PeerCapability{"tailscale.com/cap/kubernetes", "https://tailscale.com/cap/kubernetes"}
	if diff := cmp.Diff(want, impersonate.Capabilities); diff != "" {
		t.Errorf("capabilities (-want +got):\n%s", diff)
	}
}

func TestIdentity_FirstCapabilityCounts(t *testing.T) {
	const (
		current = "tailscale.com/cap/kubernetes"
		older   = "https://tailscale.com/cap/kubernetes"
		other   = "example.com/cap/staging"
	)
	grant := func(group string) []tailcfg.RawMessage {
		return raw(`{"impersonate":{"groups":["` + group + `"]}}`)
	}
	custom := []tailcfg.PeerCapability{other}

	for _, tt := range []struct {
		name         string
		capabilities []tailcfg.PeerCapability
		granted      tailcfg.PeerCapMap
		want         []string
	}{
		{"current name", impersonate.Capabilities, tailcfg.PeerCapMap{current: grant("new")}, []string{"new"}},
		{"older name alone", impersonate.Capabilities, tailcfg.PeerCapMap{older: grant("old")}, []string{"old"}},
		{"older name beside the current one is ignored", impersonate.Capabilities, tailcfg.PeerCapMap{current: grant("new"), older: grant("old")}, []string{"new"}},
		{"older name beside a current one without rules is ignored", impersonate.Capabilities, tailcfg.PeerCapMap{current: nil, older: grant("old")}, nil},
		{"older name that cannot be read does not matter beside the current one", impersonate.Capabilities, tailcfg.PeerCapMap{current: grant("new"), older: raw(`{`)}, []string{"new"}},
		{"another cluster's name is ignored", impersonate.Capabilities, tailcfg.PeerCapMap{other: grant("staging")}, nil},
		{"similar names are ignored", impersonate.Capabilities, tailcfg.PeerCapMap{current + "/": grant("a"), "Tailscale.com/cap/kubernetes": grant("b"), "http://" + current: grant("c")}, nil},
		{"a capability without a name is ignored", impersonate.Capabilities, tailcfg.PeerCapMap{"": grant("nameless")}, nil},
		{"custom name", custom, tailcfg.PeerCapMap{other: grant("staging")}, []string{"staging"}},
		{"custom name replaces both others", custom, tailcfg.PeerCapMap{current: grant("new"), older: grant("old")}, nil},
		{"custom name beside both others", custom, tailcfg.PeerCapMap{current: grant("new"), older: grant("old"), other: grant("staging")}, []string{"staging"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			peer := impersonate.Peer{Node: "laptop.example.ts.net", Login: "alice@example.com", Capabilities: tt.granted}
			id, _, err := peer.Identity(tt.capabilities)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, id.Groups); diff != "" {
				t.Errorf("groups (-want +got):\n%s", diff)
			}
		})
	}
}

func TestIdentity_RejectsMalformedGrants(t *testing.T) {
	const good = `{"impersonate":{"groups":["tailnet-readers"]}}`
	for _, malformed := range []string{
		``,
		` `,
		`{`,
		`}`,
		`[]`,
		`"system:masters"`,
		`true`,
		`1`,
		`{"impersonate":"system:masters"}`,
		`{"impersonate":[]}`,
		`{"impersonate":{"groups":"system:masters"}}`,
		`{"impersonate":{"groups":{"system:masters":true}}}`,
		`{"impersonate":{"groups":[1]}}`,
		`{"impersonate":{"groups":[["system:masters"]]}}`,
		`{"impersonate":{"groups":["tailnet-readers",]}}`,
		`{"impersonate":{"groups":["tailnet-readers"]}} {}`,
		`{"impersonate":{"groups":["tailnet-readers"]}`,
		`{'impersonate':{'groups':['tailnet-readers']}}`,
		`{"enforceRecorder":"true"}`,
		`{"recorderAddrs":["100.64.0.9"]}`,
		`{"recorderAddrs":"100.64.0.9:80"}`,
		`{"recorderAddrs":[null]}`,
		`{"recorderAddrs":[""]}`,
		`{"recorderAddrs":["100.64.0.9:0"]}`,
		`{"recorderAddrs":["100.64.0.9:80",""]}`,
		`{"enforceRecorder":1}`,
		`{"enableEvents":"yes"}`,
		"\x00",
	} {
		for _, who := range []*apitype.WhoIsResponse{
			aUser("alice@example.com", malformed),
			aUser("alice@example.com", good, malformed),
			aUser("alice@example.com", malformed, good),
			aDevice("ci.example.ts.net.", []string{"tag:ci"}, malformed),
		} {
			t.Run(malformed, func(t *testing.T) {
				id, err := identityOf(who)
				refused(t, id, err, "cannot be read")
			})
		}
	}
}

// badNames are names that a header does not carry unaltered, by what is wrong with them.
var badNames = map[string]string{
	"empty":               "",
	"blank":               " ",
	"leading blank":       " alice",
	"trailing blank":      "alice ",
	"CR":                  "ali\rce",
	"LF":                  "ali\nce",
	"CRLF":                "alice\r\nImpersonate-Group: system:masters",
	"NUL":                 "ali\x00ce",
	"tab":                 "ali\tce",
	"leading tab":         "\talice",
	"trailing LF":         "alice\n",
	"ESC":                 "ali\x1bce",
	"unit separator":      "ali\x1fce",
	"DEL":                 "ali\x7fce",
	"Latin-1":             "ali\xe9",
	"é":                   "alié",
	"no-break space":      "\u00a0alice",
	"fullwidth colon":     "system：admin",
	"zero width":          "ali\u200bce",
	"invalid UTF-8":       "ali\xffce",
	"first beyond ASCII":  "ali\x80ce",
	"replacement char":    "ali\ufffdce",
	"right-to-left marks": "\u202ealice",
}

func TestIdentity_RejectsUserThatHeadersAlter(t *testing.T) {
	for name, user := range badNames {
		t.Run(name, func(t *testing.T) {
			id, err := identityOf(aUser(user, `{"impersonate":{"groups":["tailnet-readers"]}}`))
			refused(t, id, err, "user")
			id, err = identityOf(aDevice(user, []string{"tag:ci"}))
			refused(t, id, err, "user")
		})
	}
}

func TestIdentity_RejectsGroupThatHeadersAlter(t *testing.T) {
	for name, group := range badNames {
		t.Run(name, func(t *testing.T) {
			peer := impersonate.Peer{Node: "laptop.example.ts.net", Login: "alice@example.com"}
			// Escaped by hand, as encoding/json would replace invalid UTF-8.
			quoted := strings.NewReplacer("\r", `\r`, "\n", `\n`, "\t", `\t`, "\x00", `\u0000`, "\x1b", `\u001b`, "\x1f", `\u001f`).Replace(group)
			peer.Capabilities = capMap(`{"impersonate":{"groups":["tailnet-readers","` + quoted + `","tailnet-writers"]}}`)
			id, _, err := peer.Identity(impersonate.Capabilities)
			refused(t, id, err, "group")
		})
	}
}

func TestIdentity_RejectsTagThatHeadersAlter(t *testing.T) {
	for name, bad := range badNames {
		for _, tag := range []string{bad, "tag:ci" + bad} {
			if tag == "tag:ci" || strings.HasPrefix(tag, "tag:ci ") {
				continue // a valid tag
			}
			t.Run(name, func(t *testing.T) {
				id, err := identityOf(aDevice("ci.example.ts.net.", []string{"tag:ci", tag}))
				refused(t, id, err, "tag")
			})
		}
	}
}

func TestIdentity_KeepsInnerBlanksAndPunctuation(t *testing.T) {
	const odd = `!a, b;{env.SECRET}%20"c"~`
	id, err := identityOf(aUser(odd, `{"impersonate":{"groups":["!g, h~"]}}`))
	if err != nil {
		t.Fatal(err)
	}
	if id.User != odd {
		t.Errorf("got user %q; want %q", id.User, odd)
	}
	if diff := cmp.Diff([]string{"!g, h~"}, id.Groups); diff != "" {
		t.Errorf("groups (-want +got):\n%s", diff)
	}
}

func TestIdentity_RejectsUsersOfTheCluster(t *testing.T) {
	for _, user := range []string{
		"system:admin",
		"system:kube-controller-manager",
		"system:node:worker-1",
		"system:serviceaccount:kube-system:default",
		"system:anonymous",
		"system:",
	} {
		t.Run(user, func(t *testing.T) {
			id, err := identityOf(aUser(user))
			refused(t, id, err, "system:", user)
			id, err = identityOf(aDevice(user, []string{"tag:ci"}))
			refused(t, id, err, "system:", user)
		})
	}
	// Names that Kubernetes does not reserve.
	for _, user := range []string{"system", "systematic@example.com", "alice@system:example"} {
		if id, err := identityOf(aUser(user)); err != nil || id.User != user {
			t.Errorf("user %q: got %q, %v; want the user", user, id.User, err)
		}
	}
}

func TestIdentity_RejectsTagWithoutPrefix(t *testing.T) {
	id, err := identityOf(aDevice("ci.example.ts.net.", []string{"tag:ci", "system:masters"}))
	refused(t, id, err, "system:masters", "lacks the prefix")
}

func TestIdentity_ErrorsNameThePeer(t *testing.T) {
	for _, grant := range []string{`{`, `{"recorderAddrs":[""]}`} {
		id, err := identityOf(aUser("alice@example.com", grant))
		refused(t, id, err, "alice@example.com")
		id, err = identityOf(aDevice("ci.example.ts.net.", []string{"tag:ci"}, grant))
		refused(t, id, err, "ci.example.ts.net")
	}
}

// FuzzIdentity checks that for all values of a capability, the result is either an error
// with a zero identity, or an identity that headers carry unaltered.
func FuzzIdentity(f *testing.F) {
	f.Add("alice@example.com", "", `{"impersonate":{"groups":["tailnet-readers"]}}`)
	f.Add("alice@example.com", "", "{\"impersonate\":{\"groups\":[\"a\",\"b\"]}}\n{\"impersonate\":{\"groups\":[\"b\",\"c\"]}}")
	f.Add("ci.example.ts.net", "tag:ci tag:k8s-readers", `{}`)
	f.Add("ci.example.ts.net", "tag:ci", `{"impersonate":{"groups":["\u00e9"]}}`)
	f.Add("alice@example.com", "", `{"enforceRecorder":true,"recorderAddrs":["100.64.0.9:80"]}`)
	f.Add("alice@example.com", "", `{"impersonate":{"groups":["a"],"Groups":["b"]},"enforceRecorder":true,"enforcerecorder":false}`)
	f.Add("ci.example.ts.net", "tag:ci", `{"impersonate":{"group":["a"]}}`)
	f.Add("ci.example.ts.net", "tag:ci", `{"impersonate":{"groups":["a"]},"impersonate":{"groups":[]}}`)
	f.Add("system:admin", "", `{`)
	f.Add("alice\r\n", "tag:\x00", `{"impersonate":{"groups":["a\r\nb"," c"]}}`)

	valid := regexp.MustCompile(`^[!-~]([ -~]*[!-~])?$`)
	f.Fuzz(func(t *testing.T, name, tags, grants string) {
		who := aUser(name, strings.Split(grants, "\n")...)
		if tags != "" {
			who = aDevice(name, strings.Split(tags, " "), strings.Split(grants, "\n")...)
		}
		id, err := identityOf(who)
		if err != nil {
			refused(t, id, err)
			return
		}
		rules, err := tailcfg.UnmarshalCapJSON[kubetypes.KubernetesCapRule](who.CapMap, impersonate.Capabilities[0])
		if err != nil {
			t.Errorf("Tailscale's own proxy cannot read the grants: %v", err)
		}
		var granted []string
		for _, rule := range rules {
			if rule.EnforceRecorder && !id.Recording.Enforce {
				t.Error("recording is not enforced")
			}
			if rule.Impersonate != nil {
				granted = append(granted, rule.Impersonate.Groups...)
			}
		}
		if len(granted) > 0 && id.Source != impersonate.SourceGrants {
			t.Errorf("groups %q are granted; got groups %q from source %q", granted, id.Groups, id.Source)
		}
		if !valid.MatchString(id.User) || strings.HasPrefix(id.User, "system:") {
			t.Errorf("got user %q, which may not be impersonated", id.User)
		}
		for i, group := range id.Groups {
			if !valid.MatchString(group) {
				t.Errorf("got group %q, which a header cannot carry", group)
			}
			if id.Source == impersonate.SourceGrants && !slices.Contains(granted, group) {
				t.Errorf("got group %q, which is not granted", group)
			}
			if id.Source == impersonate.SourceGrants && slices.Contains(id.Groups[:i], group) {
				t.Errorf("got group %q twice", group)
			}
		}
		if (len(id.Groups) == 0) != (id.Source == impersonate.SourceNone) {
			t.Errorf("got groups %q from source %q", id.Groups, id.Source)
		}

		sent := make(http.Header)
		id.SetHeaders(sent)
		var wire bytes.Buffer
		if err := sent.Write(&wire); err != nil {
			t.Fatal(err)
		}
		wire.WriteString("\r\n")
		received, err := textproto.NewReader(bufio.NewReader(&wire)).ReadMIMEHeader()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(sent, http.Header(received)); diff != "" {
			t.Errorf("headers altered on the wire (-sent +received):\n%s", diff)
		}
	})
}

func BenchmarkIdentity(b *testing.B) {
	peer, err := impersonate.PeerFrom(aUser("alice@example.com",
		`{"impersonate":{"groups":["tailnet-readers"]}}`,
		`{"impersonate":{"groups":["system:masters","tailnet-readers"]}}`))
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := peer.Identity(impersonate.Capabilities); err != nil {
			b.Fatal(err)
		}
	}
}
