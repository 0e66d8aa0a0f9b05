// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

// Each line is what a caller asks for on a site, and the user and groups that the API
// server sees, or what kubectl prints about the refusal.
func TestChoice_APIServerSeesWhatWasAskedFor(t *testing.T) {
	const (
		alice, bob, dave, erin = "alice@example.com", "bob@example.com", "dave@example.com", "erin@example.com"
		ci, ops                = "ci." + lab.Domain, "ops." + lab.Domain
	)
	admins := masters()
	as := func(user string, groups ...string) []string {
		args := []string{"--as", user}
		for _, group := range groups {
			args = append(args, "--as-group", group)
		}
		return args
	}
	for _, tt := range []struct {
		port, caller string
		ask          []string
		want         []string // user and groups, without system:authenticated
		refused      string
	}{
		// One group, which is optional.
		{portChoice, "alice", nil, []string{alice}, ""},
		{portChoice, "alice", as(alice, admins), []string{alice, admins}, ""},
		{portChoice, "alice", as(alice), []string{alice}, ""},
		{portChoice, "alice", as(alice, "c"), nil, fmt.Sprintf(`%s asks for the group "c", which it is not granted; it may ask for: %s`, alice, admins)},
		{portChoice, "alice", as(alice, admins, "c"), nil, `asks for the group "c"`},
		{portChoice, "alice", as(bob), nil, "may not act as another user"},
		{portChoice, "alice", as(bob, admins), nil, "may not act as another user"},
		// One group, which is always used.
		{portChoice, "bob", nil, []string{bob, "tailnet-readers"}, ""},
		{portChoice, "bob", as(bob, "tailnet-readers"), []string{bob, "tailnet-readers"}, ""},
		{portChoice, "bob", as(bob), []string{bob}, ""},
		{portChoice, "bob", as(bob, admins), nil, `asks for the group "` + admins + `"`},
		{portChoice, "bob", as(bob, "system:authenticated"), nil, `asks for the group "system:authenticated"`},
		{portChoice, "bob", as(alice, "tailnet-readers"), nil, "may not act as another user"},
		// Several, and one of them optional.
		{portChoice, "erin", nil, []string{erin, "b", "a"}, ""},
		{portChoice, "erin", as(erin, "c"), []string{erin, "c"}, ""},
		{portChoice, "erin", as(erin, "a"), []string{erin, "a"}, ""},
		{portChoice, "erin", as(erin, "c", "a"), []string{erin, "a", "c"}, ""},
		{portChoice, "erin", as(erin, "a", "b", "c"), []string{erin, "b", "a", "c"}, ""},
		{portChoice, "erin", as(erin), []string{erin}, ""},
		{portChoice, "erin", as(erin, "a", "d"), nil, `asks for the group "d", which it is not granted; it may ask for: b, a, c`},
		{portChoice, "erin", append(as(erin, "a"), "--as-uid", "1"), nil, "may not act as another user"},
		// Tagged devices: by tag, and by a grant of an optional group, which is not made up for by tags.
		{portChoice, "ci", nil, []string{ci, "tag:k8s-readers"}, ""},
		{portChoice, "ci", as(ci, "tag:k8s-readers"), []string{ci, "tag:k8s-readers"}, ""},
		{portChoice, "ci", as(ci), []string{ci}, ""},
		{portChoice, "ops", nil, []string{ops}, ""},
		{portChoice, "ops", as(ops, "ops"), []string{ops, "ops"}, ""},
		{portChoice, "ops", as(ops, "tag:k8s-ops"), nil, `asks for the group "tag:k8s-ops"`},
		// None.
		{portChoice, "dave", nil, []string{dave}, ""},
		{portChoice, "dave", as(dave), []string{dave}, ""},
		{portChoice, "dave", as(dave, "a"), nil, "it may ask for: none"},
		// The API server decides about the rest.
		{portChoiceAuthorize, "erin", as(erin, "c"), []string{erin, "c"}, ""},
		{portChoiceAuthorize, "erin", as(erin, "c", "d"), nil, "cannot impersonate"},
		{portChoiceAuthorize, "dave", as(dave), []string{dave}, ""},
		{portChoiceAuthorize, "dave", as(bob), nil, "cannot impersonate"},
		{portChoiceAuthorize, "alice", as(bob, "tailnet-readers"), nil, "cannot impersonate"}, // alice does not use the group that may
		{portChoiceAuthorize, "alice", as(alice, admins), []string{alice, admins}, ""},
		// Limits: a is denied, c and tailnet-readers are optional, and a group is required.
		{portChoiceLimits, "erin", nil, []string{"tailnet:" + erin, "tailnet:b"}, ""},
		{portChoiceLimits, "erin", as("tailnet:"+erin, "tailnet:c"), []string{"tailnet:" + erin, "tailnet:c"}, ""},
		{portChoiceLimits, "erin", as("tailnet:"+erin, "tailnet:a"), nil, `asks for the group "tailnet:a"`},
		{portChoiceLimits, "erin", as("tailnet:"+erin, "c"), nil, `asks for the group "c"`},
		{portChoiceLimits, "erin", as(erin, "tailnet:c"), nil, "may not act as another user"},
		{portChoiceLimits, "erin", as("tailnet:" + erin), nil, "require_groups is on"},
		{portChoiceLimits, "bob", nil, nil, "--as-group=tailnet:tailnet-readers"},
		{portChoiceLimits, "bob", as("tailnet:"+bob, "tailnet:tailnet-readers"), []string{"tailnet:" + bob, "tailnet:tailnet-readers"}, ""},
	} {
		t.Run(strings.Join(append([]string{tt.port, tt.caller}, tt.ask...), " "), func(t *testing.T) {
			stdout, stderr, err := runKubectl(t, kubeconfigFor(t, tt.caller, tt.port), nil, append([]string{"auth", "whoami", "-o", "json"}, tt.ask...)...)
			if tt.refused != "" {
				if err == nil || !strings.Contains(stderr, tt.refused) {
					t.Errorf("got %v %s%s; want a refusal with %q", err, stdout, stderr, tt.refused)
				}
				return
			}
			if err != nil {
				t.Fatalf("%v %s", err, stderr)
			}
			var review struct{ Status struct{ UserInfo userInfo } }
			if err := json.Unmarshal([]byte(stdout), &review); err != nil {
				t.Fatalf("%v: %s", err, stdout)
			}
			got := review.Status.UserInfo
			groups := slices.DeleteFunc(got.Groups, func(g string) bool { return g == "system:authenticated" })
			if diff := cmp.Diff(tt.want, append([]string{got.Username}, groups...)); diff != "" {
				t.Errorf("user and groups (-want +got):\n%s", diff)
			}
		})
	}
}

func TestChoice_AuditNamesChosenAndHeldBackGroups(t *testing.T) {
	got := whoAmIAt(t, kubeconfigFor(t, "erin", portChoiceLimits), "--as", "tailnet:erin@example.com", "--as-group", "tailnet:c")
	for key, want := range map[string][]string{impersonate.ExtraChosenGroups: {"tailnet:c"}, impersonate.ExtraHeldBackGroups: {"tailnet:b"}} {
		if diff := cmp.Diff(want, got.Extra[key]); diff != "" {
			t.Errorf("%s (-want +got):\n%s", key, diff)
		}
	}
}

// The kubeconfig of the page has a context for each way to use the cluster.
func TestChoice_ContextsOfThePage(t *testing.T) {
	for _, tt := range []struct {
		caller, context string
		want            []string
	}{
		{"erin", "", []string{"tailnet:c"}}, // for reading only
		{"erin", "k8s.tailnet.example:" + portChoiceLimits + "-read-only", []string{"tailnet:c"}},
		{"erin", "k8s.tailnet.example:" + portChoiceLimits, []string{"tailnet:b"}},
		{"bob", "k8s.tailnet.example:" + portChoiceLimits + "-tailnet-tailnet-readers", []string{"tailnet:tailnet-readers"}},
	} {
		file, _ := downloadKubeconfig(t, tt.caller, portChoiceLimits)
		var args []string
		if tt.context != "" {
			args = []string{"--context", tt.context}
		}
		got := whoAmIAt(t, file, args...)
		if diff := cmp.Diff(append(tt.want, "system:authenticated"), got.Groups); diff != "" {
			t.Errorf("%s with context %q: groups (-want +got):\n%s", tt.caller, tt.context, diff)
		}
	}
}

// A session in a group that record_groups names does not begin unless it is recorded.
func TestChoice_RecordGroupsFailClosed(t *testing.T) {
	asked := []string{"exec", lab.Pod, "--as", "alice@example.com", "--as-group", masters(), "--", "echo", "hello"}
	stdout, stderr, err := runKubectl(t, kubeconfigFor(t, "alice", portChoice), nil, asked...)
	if err == nil || !strings.Contains(stderr, "record") || strings.Contains(stdout, "hello") {
		t.Errorf("got %v %s%s; want a refusal, as nothing records the session", err, stdout, stderr)
	}
	if stdout, stderr, err := runKubectl(t, kubeconfigFor(t, "alice", portChoiceAuthorize), nil, asked...); err != nil || stdout != "hello\n" {
		t.Errorf("without record_groups: %v %s%s", err, stdout, stderr)
	}
	if _, stderr, err := runKubectl(t, kubeconfigFor(t, "alice", portChoiceAuthorize), nil, "exec", lab.Pod, "--", "true"); err == nil || !strings.Contains(stderr, `User "alice@example.com" cannot`) {
		t.Errorf("without asking, alice opens a shell: %v %s", err, stderr)
	}
}

// A grant for a limited time gives an optional group, and takes it from open streams when
// it is withdrawn. What the caller has open without the group goes on.
func TestChoice_GrantForALimitedTime(t *testing.T) {
	const login = "bob@example.com"
	asked := []string{"--as", login, "--as-group", masters()}
	kubeconfig := kubeconfigFor(t, "bob", portChoiceAuthorize)
	if _, stderr, err := runKubectl(t, kubeconfigFor(t, "bob", portChoice), nil, append(asked, "get", "secrets")...); err == nil || !strings.Contains(stderr, "which it is not granted") {
		t.Errorf("before: %v %s; want a refusal", err, stderr)
	}
	const object = "for-a-limited-time"
	kubectl(t, "alice", "create", "configmap", object)
	t.Cleanup(func() { kubectl(t, "alice", "delete", "configmap", object, "--ignore-not-found") })
	watch := []string{"get", "configmaps", "--watch", "--output-watch-events", "--no-headers", "--field-selector", "metadata.name=" + object}
	usual := startKubectl(t, kubeconfig, nil, watch...)
	usual.want(t, "ADDED")

	withdraw := grantTo(t, login, masters())
	eventually(t, "bob may list secrets when he asks for it", func() error {
		_, stderr, err := runKubectl(t, kubeconfig, nil, append(asked, "get", "secrets")...)
		if err != nil {
			return fmt.Errorf("%w: %s", err, stderr)
		}
		return nil
	})
	if _, stderr, err := runKubectl(t, kubeconfig, nil, "get", "secrets"); err == nil || !strings.Contains(stderr, "cannot list") {
		t.Errorf("without asking: %v %s; want a refusal of the API server", err, stderr)
	}
	shell := startKubectl(t, kubeconfig, nil, append(asked, "exec", "-i", lab.Pod, "--", "cat")...)
	shell.echoes(t, "hello")
	forward := startKubectl(t, kubeconfig, nil, append(asked, "port-forward", "--address=127.0.0.1", lab.Pod, ":"+echoServer(t))...)
	address := strings.Fields(forward.want(t, "Forwarding from "))[2]
	if err := roundTrip(dialLocal(t, address), noise(1000)); err != nil {
		t.Fatal(err)
	}
	admins := startKubectl(t, kubeconfig, nil, append(asked, watch...)...)
	admins.want(t, "ADDED")

	withdraw()
	withdrawn := time.Now()
	for what, s := range map[string]*session{"exec": shell, "port-forward": forward, "watch": admins} {
		select {
		case <-s.ended:
		case <-time.After(time.Until(withdrawn.Add(revokedWithin))):
			t.Errorf("the %s is still open %v after the grant was withdrawn", what, revokedWithin)
		}
	}
	kubectl(t, "alice", "label", "configmap", object, "seen=yes")
	usual.want(t, "MODIFIED")
}

// Each line of the table in docs/agents.md. The agent's device is tagged.
func TestAgents_OnlyRead(t *testing.T) {
	kubeconfig := kubeconfigFor(t, "ci", portAgents)
	const onlyRead = "agents only read here"
	for _, tt := range []struct {
		args []string
		want string // in standard error; empty for what is allowed
	}{
		{[]string{"get", "pods"}, ""},
		{[]string{"auth", "whoami"}, ""},
		{[]string{"auth", "can-i", "list", "pods"}, ""},
		{[]string{"get", "secrets"}, `User "ci.` + lab.Domain + `" cannot list resource "secrets"`},
		{[]string{"create", "configmap", "agent"}, onlyRead},
		{[]string{"delete", "pod", lab.Pod}, onlyRead},
		{[]string{"label", "pod", lab.Pod, "agent=yes"}, onlyRead},
		{[]string{"exec", lab.Pod, "--", "true"}, onlyRead},
		{[]string{"attach", lab.Pod}, onlyRead},
		{[]string{"port-forward", lab.Pod, ":80"}, onlyRead},
		{[]string{"get", "pods", "--as", "alice@example.com"}, "may not act as another user"},
		{[]string{"get", "pods", "--as", "ci." + lab.Domain, "--as-group", "tailnet-readers"}, `asks for the group "tailnet-readers", which it is not granted`},
	} {
		_, stderr, err := runKubectl(t, kubeconfig, nil, tt.args...)
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(stderr, tt.want)) {
			t.Errorf("kubectl %s: %v %s; want an error with %q, if any", tt.args, err, stderr, tt.want)
		}
	}
}
