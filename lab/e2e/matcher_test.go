// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

// kubeconfigAt returns a kubeconfig file of a caller for another port of the proxy's
// node.
func kubeconfigAt(t *testing.T, caller, port string) string {
	t.Helper()
	c := theLab.Callers[caller]
	path := c.Kubeconfig + "." + port
	if err := c.WriteKubeconfig(path, "http://"+lab.ProxyName+":"+port); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestMatcher_ReadOnlySiteRefusesWrites(t *testing.T) {
	kubeconfig := kubeconfigAt(t, "alice", portReadOnly) // a cluster-admin
	began := time.Now()
	audit := tail(t, theLab.Cluster.AuditLog())
	for _, args := range []string{
		"get pods",
		"get secrets --all-namespaces",
		"logs " + lab.Pod + " --tail=1",
		"api-resources",
		"auth whoami",
		"auth can-i delete pods",
		"describe pod " + lab.Pod,
	} {
		if _, stderr, err := runKubectl(t, kubeconfig, nil, strings.Fields(args)...); err != nil {
			t.Errorf("kubectl %s: %v: %s", args, err, stderr)
		}
	}
	for _, args := range []string{
		"create configmap read-only --from-literal=a=b",
		"delete pod " + lab.Pod,
		"label pod " + lab.Pod + " a=b",
		"create token default",
		"exec " + lab.Pod + " -- true",
		"port-forward pod/" + lab.Pod + " :80",
		"debug " + lab.Pod + " --image=none",
		"get --raw /api/v1/namespaces/default/services/none/proxy/",
		"get --raw /api/v1/nodes/lab/proxy/pods",
	} {
		for _, websockets := range []string{"true", "false"} {
			env := []string{"KUBECTL_REMOTE_COMMAND_WEBSOCKETS=" + websockets, "KUBECTL_PORT_FORWARD_WEBSOCKETS=" + websockets}
			_, stderr, err := runKubectl(t, kubeconfig, env, strings.Fields(args)...)
			if err == nil || !strings.Contains(stderr, "this site is read-only") {
				t.Errorf("kubectl %s (websockets %s): %v: %s; want an error: the site is read-only", args, websockets, err, stderr)
			}
		}
	}
	// The API server received her reads, and nothing else.
	reads := 0
	for _, line := range audit.lines(t) {
		if !strings.Contains(line, `"impersonatedUser":{"username":"alice@example.com"`) {
			continue
		}
		var event struct {
			Received time.Time `json:"requestReceivedTimestamp"`
		}
		if err := json.Unmarshal([]byte(line), &event); err != nil {
			t.Fatalf("audit log: %v: %s", err, line)
		}
		if event.Received.Before(began) {
			continue // a session of an earlier test, which has ended now
		}
		reads++
		for _, sign := range []string{`"verb":"create"`, `"verb":"delete"`, `"verb":"patch"`, `"verb":"update"`, `"subresource":"exec"`, `"subresource":"portforward"`, `"subresource":"proxy"`} {
			if strings.Contains(line, sign) && !strings.Contains(line, "selfsubject") {
				t.Errorf("the API server received %s", line)
			}
		}
	}
	if reads == 0 {
		t.Error("the audit log has no request of alice; want her reads")
	}
}

func TestMatcher_TaggedDevicesGetNoShell(t *testing.T) {
	const says = "tagged devices get no shell"
	for caller, refused := range map[string]bool{"alice": false, "ci": true} {
		_, stderr, err := runKubectl(t, kubeconfigAt(t, caller, portNoShells), nil, "exec", lab.Pod, "--", "true")
		if (err != nil) != refused || strings.Contains(stderr, says) != refused {
			t.Errorf("kubectl exec as %s: %v: %s; want refused by the site: %v", caller, err, stderr, refused)
		}
	}
	// A tagged device is one even if a grant gives it groups.
	for caller, refused := range map[string]bool{"bob": false, "ops": true} {
		_, stderr, err := runKubectl(t, kubeconfigAt(t, caller, portNoShells), nil, "get", "--raw", "/api/v1/namespaces/default/pods/"+lab.Pod+"/proxy/")
		if err == nil || strings.Contains(stderr, says) != refused {
			t.Errorf("the pod's proxy as %s: %v: %s; want refused by the site: %v, otherwise by the API server", caller, err, stderr, refused)
		}
	}
	if got := kubectl(t, "ci", "--kubeconfig="+kubeconfigAt(t, "ci", portNoShells), "get", "pods"); !strings.Contains(got, lab.Pod) {
		t.Errorf("kubectl get pods as ci printed %s", got)
	}
}

// A path that the API server and other parsers read differently is refused where a
// matcher decides.
func TestMatcher_AmbiguousPathIsRefused(t *testing.T) {
	const path = "/api/v1/namespaces/default/pods%2Fweb"
	if resp := send(t, "alice", "80", get(path)); resp.StatusCode != http.StatusOK {
		t.Fatalf("without a matcher: %s %s; want 200", resp.Status, resp.body)
	}
	resp := send(t, "alice", portReadOnly, get(path))
	if resp.StatusCode != http.StatusBadRequest || !strings.Contains(resp.body, `"kind":"Status"`) || !strings.Contains(resp.body, "more than one way") {
		t.Errorf("with a matcher: %s %s; want a Status with code 400", resp.Status, resp.body)
	}
}

func TestMatcher_RequestRewrittenAfterMatchIsNotSent(t *testing.T) {
	kubectl(t, "alice", "create", "configmap", "rewritten")
	t.Cleanup(func() { kubectl(t, "alice", "delete", "configmap", "rewritten") })
	_, stderr, err := runKubectl(t, kubeconfigAt(t, "alice", portRewriting), nil, "get", "configmap", "rewritten")
	if err == nil || !strings.Contains(stderr, "the config rewrites requests behind the matcher") {
		t.Errorf("kubectl get: %v: %s; want a refusal", err, stderr)
	}
}
