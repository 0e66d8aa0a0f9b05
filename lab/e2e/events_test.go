// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"tailscale.com/sessionrecording"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recordertest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

const mustBeRecorded = "the request has to be recorded, and no recorder takes that"

// grantEvents grants dave, who has no other rights, everything, with events sent to
// a recorder. It waits until the grant is in force: until his requests succeed, or,
// if refused, until they fail because they have to be recorded.
func grantEvents(t *testing.T, recorder string, enforce, refused bool) {
	t.Helper()
	grantRuleTo(t, "dave@example.com", map[string]any{
		"impersonate":   map[string]any{"groups": []string{masters()}},
		"recorderAddrs": []string{recorder}, "enforceRecorder": enforce, "enableEvents": true,
	})
	eventually(t, "the grant is in force", func() error {
		_, stderr, err := tryKubectl(t, "dave", "get", "secrets")
		if (err != nil) != refused || strings.Contains(stderr, mustBeRecorded) != refused {
			return fmt.Errorf("kubectl get secrets printed %q, failed: %t; want failed: %t", stderr, err != nil, refused)
		}
		return nil
	})
	sessions.TakeEvents()
}

// theEvent returns the only event of a verb on a resource.
func theEvent(t *testing.T, verb, resource string) *sessionrecording.Event {
	t.Helper()
	events := sessions.TakeEvents()
	i := slices.IndexFunc(events, func(e *sessionrecording.Event) bool {
		return e.Kubernetes.Verb == verb && e.Kubernetes.Resource == resource
	})
	if i < 0 {
		t.Fatalf("the recorder has %d events, none of %s %s", len(events), verb, resource)
	}
	return events[i]
}

func TestEvents_AreSentToRecorder(t *testing.T) {
	grantEvents(t, sessions.Addr.String(), true, false)
	kubectl(t, "dave", "create", "configmap", "events", "--from-literal=a=b")
	t.Cleanup(func() { kubectl(t, "alice", "delete", "configmap", "events") })
	e := theEvent(t, "create", "configmaps")
	if !strings.Contains(string(e.Request.Body), "events") || e.Kubernetes.Namespace != "default" || !strings.HasPrefix(e.UserAgent, "kubectl/") {
		t.Errorf("got %+v with the body %s; want the complete event", e, e.Request.Body)
	}
	if e.Source.Node != "dave."+lab.Domain || e.Source.NodeUser != "dave@example.com" || e.Source.NodeID == "" || e.Source.NodeUserID == 0 {
		t.Errorf("got the source %+v; want dave's device", e.Source)
	}

	kubectl(t, "dave", "create", "secret", "generic", "events", "--from-literal=a=b")
	t.Cleanup(func() { kubectl(t, "alice", "delete", "secret", "events") })
	if body := string(theEvent(t, "create", "secrets").Request.Body); body != "[the body is left out: it may hold secrets]" {
		t.Errorf("got the body %q of a Secret; want none", body)
	}

	// A body larger than the event's limit still arrives at the API server.
	big := filepath.Join(t.TempDir(), "big")
	if err := os.WriteFile(big, []byte(strings.Repeat("0123456789", 20_000)), 0o600); err != nil {
		t.Fatal(err)
	}
	kubectl(t, "dave", "create", "configmap", "big", "--from-file="+big)
	t.Cleanup(func() { kubectl(t, "alice", "delete", "configmap", "big") })
	if body := string(theEvent(t, "create", "configmaps").Request.Body); len(body) > 66_000 || !strings.HasSuffix(body, "[the body is cut off after 65536 bytes]") {
		t.Errorf("got a body of %d bytes; want 65536 and a note that it is cut off", len(body))
	}
	if got := kubectl(t, "alice", "get", "configmap", "big", "-o", "jsonpath={.data.big}"); len(got) != 200_000 {
		t.Errorf("the object has %d bytes; want 200000", len(got))
	}

	if got := kubectl(t, "dave", "exec", lab.Pod, "--", "echo", "hello"); got != "hello\n" {
		t.Errorf("exec printed %q; want hello", got)
	}
	events := sessions.TakeEvents()
	if !slices.ContainsFunc(events, func(e *sessionrecording.Event) bool {
		return e.Kubernetes.Subresource == "exec" && slices.Contains(e.Request.QueryParameters["command"], "hello")
	}) {
		t.Errorf("none of %d events is the exec with its command", len(events))
	}
	sessions.Take()
}

func TestEvents_EnforcedRequestFailsWithoutRecorder(t *testing.T) {
	grantEvents(t, absentRecorder, true, true)
	_, stderr, err := tryKubectl(t, "dave", "create", "configmap", "unrecorded")
	if err == nil || !strings.Contains(stderr, mustBeRecorded) {
		t.Errorf("kubectl create: %v: %s; want an error: the request has to be recorded", err, stderr)
	}
	if _, _, err := tryKubectl(t, "alice", "get", "configmap", "unrecorded"); err == nil {
		t.Error("the configmap was created")
	}
}

func TestEvents_OptionalRequestSucceedsWithoutRecorder(t *testing.T) {
	grantEvents(t, sessions.Addr.String(), false, false)
	sessions.SetMode(recordertest.Failing)
	t.Cleanup(func() { sessions.SetMode(recordertest.V2) })
	kubectl(t, "dave", "get", "secrets")
}
