// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

// kubeconfigFor returns a kubeconfig for a caller and the site at a port of the
// proxy's node.
func kubeconfigFor(t *testing.T, caller, port string) string {
	t.Helper()
	path := theLab.Callers[caller].Kubeconfig + "." + port
	if err := theLab.Callers[caller].WriteKubeconfig(path, "http://"+lab.ProxyName+":"+port); err != nil {
		t.Fatal(err)
	}
	return path
}

// userInfo is a user as the API server sees it.
type userInfo struct {
	Username string
	UID      string
	Groups   []string
	Extra    map[string][]string
}

// whoAmIAt returns the user that `kubectl auth whoami` prints for a caller.
func whoAmIAt(t *testing.T, kubeconfig string, args ...string) userInfo {
	t.Helper()
	stdout, stderr, err := runKubectl(t, kubeconfig, nil, append([]string{"auth", "whoami", "-o", "json"}, args...)...)
	if err != nil {
		t.Fatalf("kubectl auth whoami %s: %v: %s", strings.Join(args, " "), err, stderr)
	}
	var review struct{ Status struct{ UserInfo userInfo } }
	if err := json.Unmarshal([]byte(stdout), &review); err != nil {
		t.Fatalf("%v: %s", err, stdout)
	}
	return review.Status.UserInfo
}

// device returns what the tailnet knows about a caller: its address, its node ID and
// its user ID.
func device(t *testing.T, caller string) (address, nodeID, userID string) {
	t.Helper()
	client, err := theLab.Callers[caller].Server.LocalClient()
	if err != nil {
		t.Fatal(err)
	}
	status, err := client.StatusWithoutPeers(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return status.Self.TailscaleIPs[0].String(), string(status.Self.ID), fmt.Sprint(int64(status.Self.UserID))
}

func TestAudit_KubectlWhoamiShowsDevice(t *testing.T) {
	for _, tt := range []struct {
		caller string
		source string
		tags   []string
	}{
		{"alice", "grants", nil},
		{"carol", "none", nil},
		{"ci", "tags", []string{"tag:k8s-readers"}},
		{"ops", "grants", []string{"tag:k8s-ops"}},
	} {
		t.Run(tt.caller, func(t *testing.T) {
			address, nodeID, uid := device(t, tt.caller)
			got := whoAmIAt(t, kubeconfigFor(t, tt.caller, portAudit))
			want := map[string][]string{
				impersonate.ExtraNode: {tt.caller + "." + lab.Domain}, impersonate.ExtraNodeID: {nodeID}, impersonate.ExtraAddress: {address},
				impersonate.ExtraGroupsSource: {tt.source}, impersonate.ExtraRequestID: got.Extra[impersonate.ExtraRequestID],
			}
			if tt.tags != nil {
				want[impersonate.ExtraTags] = tt.tags
				uid = nodeID
			}
			if diff := cmp.Diff(want, got.Extra); diff != "" {
				t.Errorf("extra fields (-want +got):\n%s", diff)
			}
			if got.UID != uid {
				t.Errorf("got UID %q; want %q", got.UID, uid)
			}
			if len(got.Extra[impersonate.ExtraRequestID]) != 1 {
				t.Errorf("got request IDs %q; want one", got.Extra[impersonate.ExtraRequestID])
			}
		})
	}
}

// auditEvent has the fields of an audit event that tests check.
type auditEvent struct {
	AuditID          string
	RequestURI       string
	Verb             string
	ObjectRef        *objectRef
	User             userInfo
	ImpersonatedUser *userInfo
	ResponseStatus   struct{ Code int }
	SourceIPs        []string
}

// audited waits until the audit log has the event of the request for a path.
func audited(t *testing.T, log *tailed, uri string) auditEvent {
	t.Helper()
	var found auditEvent
	eventually(t, "the audit log has "+uri, func() error {
		for _, line := range log.lines(t) {
			var event auditEvent
			if json.Unmarshal([]byte(line), &event) == nil && event.RequestURI == uri {
				found = event
				return nil
			}
		}
		return errors.New("no such entry")
	})
	return found
}

func TestAudit_LogNamesDevice(t *testing.T) {
	const uri = "/api/v1/namespaces/default/pods?labelSelector=audit-log"
	log, access := tail(t, theLab.Cluster.AuditLog()), tail(t, theLab.Log("caddy"))
	if resp := send(t, "ci", portAudit, get(uri, "X-Forwarded-For: 192.0.2.1")); resp.StatusCode != 200 {
		t.Fatalf("%s %s", resp.Status, resp.body)
	}
	event := audited(t, log, uri)
	address, nodeID, _ := device(t, "ci")
	if event.User.Username != "system:serviceaccount:tailscale-impersonate:proxy" || event.ImpersonatedUser == nil {
		t.Fatalf("got event %+v; want the proxy impersonating a user", event)
	}
	who := *event.ImpersonatedUser
	if who.Username != "ci."+lab.Domain || who.UID != nodeID || who.Extra[impersonate.ExtraTags][0] != "tag:k8s-readers" || who.Extra[impersonate.ExtraAddress][0] != address {
		t.Errorf("the audit log has %+v; want ci, its ID %s, its tag and its address", who, nodeID)
	}
	if id := who.Extra[impersonate.ExtraRequestID]; len(id) != 1 || id[0] != event.AuditID {
		t.Errorf("the request ID is %q, but %s in the audit log", id, event.AuditID)
	}
	eventually(t, "the access log has the request's ID", func() error {
		for _, line := range access.lines(t) {
			if strings.Contains(line, "audit-log") && strings.Contains(line, `"uuid":"`+event.AuditID+`"`) {
				return nil
			}
		}
		return errors.New("no such entry")
	})
}

// The examples' policy refuses callers that RBAC would allow.
func TestAudit_AdmissionPolicySeesDeviceTag(t *testing.T) {
	root, err := lab.Root()
	if err != nil {
		t.Fatal(err)
	}
	policy, err := os.ReadFile(filepath.Join(root, "examples", "kubernetes", "40-admission-policy.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	const rbac = `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata:
  name: e2e-protected
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: ClusterRole
  name: edit
subjects:
  - {apiGroup: rbac.authorization.k8s.io, kind: Group, name: ops}
  - {apiGroup: rbac.authorization.k8s.io, kind: Group, name: "tag:k8s-readers"}
`
	admin := theLab.AdminKubeconfig()
	for _, manifest := range []string{string(policy), rbac} {
		if err := theLab.Cluster.Apply(t.Context(), []byte(manifest)); err != nil {
			t.Fatal(err)
		}
	}
	cleanUp := func(args ...string) {
		t.Cleanup(func() {
			// A deleted policy stays in force for a short time.
			eventually(t, "the end of "+args[0], func() error {
				if _, stderr, err := runKubectl(t, admin, nil, append([]string{"delete", "--ignore-not-found"}, args...)...); err != nil {
					return fmt.Errorf("%w: %s", err, stderr)
				}
				return nil
			})
		})
	}
	cleanUp("configmap", "protected")
	cleanUp("clusterrolebinding", "e2e-protected")
	cleanUp("validatingadmissionpolicybinding,validatingadmissionpolicy", "protected-by-tag")
	for _, args := range [][]string{
		{"create", "configmap", "protected"},
		{"label", "configmap", "protected", "tailscale-impersonate.github.io/protected=true"},
	} {
		if _, stderr, err := runKubectl(t, admin, nil, args...); err != nil {
			t.Fatalf("%s: %s", args, stderr)
		}
	}

	const refusal = "only a device with the tag tag:k8s-ops may delete this"
	remove := func(caller, port string) (string, error) {
		_, stderr, err := runKubectl(t, kubeconfigFor(t, caller, port), nil, "delete", "configmap", "protected", "--dry-run=server")
		return stderr, err
	}
	eventually(t, "the policy is in force", func() error {
		if stderr, err := remove("alice", portAudit); err == nil || !strings.Contains(stderr, refusal) {
			return fmt.Errorf("alice deleting: %w %s", err, stderr)
		}
		return nil
	})
	for _, tt := range []struct{ why, caller, port string }{
		{"another tag", "ci", portAudit},
		{"the tag, but no audit extras", "ops", "80"},
	} {
		if stderr, err := remove(tt.caller, tt.port); err == nil || !strings.Contains(stderr, refusal) {
			t.Errorf("%s: %s deleting: %v %s; want the policy's refusal", tt.why, tt.caller, err, stderr)
		}
	}
	if stderr, err := remove("ops", portAudit); err != nil {
		t.Errorf("a device with the tag deleting: %v %s", err, stderr)
	}
}
