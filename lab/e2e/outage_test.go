// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

func TestOutage_ReplacedTokenFailsNoRequest(t *testing.T) {
	defer firstConfig(t)
	testReplacedToken(t, func(a *asking) {
		// A new config reads the file at once. As docs/limits.md says, a reload may
		// cut off an exec that has just connected, so none is running.
		a.commands.Lock()
		defer a.commands.Unlock()
		if err := theLab.Caddy.Load(withVersion("other")); err != nil {
			t.Fatal(err)
		}
	})
}

func TestOutage_ReplacedTokenIsUsedWithinMinute(t *testing.T) {
	if !*long {
		t.Skip("takes more than a minute: run with -long")
	}
	testReplacedToken(t, func(*asking) {})
}

// testReplacedToken replaces the proxy's token while requests run, and revokes the
// old one as soon as the new one is in use. notice may make the proxy read the new
// one earlier.
func testReplacedToken(t *testing.T, notice func(*asking)) {
	const namespace, name = "tailscale-impersonate", "proxy"
	admin, err := kubernetes.NewForConfig(theLab.Cluster.Admin())
	if err != nil {
		t.Fatal(err)
	}
	audit := tail(t, theLab.Cluster.AuditLog())

	// A token that is bound to a Secret is revoked with it.
	secret, err := admin.CoreV1().Secrets(namespace).Create(t.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{GenerateName: "old-token-"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	seconds := int64(3600)
	old, err := admin.CoreV1().ServiceAccounts(namespace).CreateToken(t.Context(), name, &authenticationv1.TokenRequest{
		Spec: authenticationv1.TokenRequestSpec{
			ExpirationSeconds: &seconds,
			BoundObjectRef:    &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Secret", Name: secret.Name, UID: secret.UID},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	replaceToken(t, old.Status.Token)
	if err := theLab.Caddy.Load(withVersion("old-token")); err != nil {
		t.Fatal(err)
	}
	requests := keepAsking(t)
	inUse := func(token string) {
		t.Helper()
		id := tokenID(t, token)
		within(t, 90*time.Second, "the API server sees the token "+id, func() error {
			for _, line := range audit.lines(t) {
				if strings.Contains(line, id) && strings.Contains(line, `"impersonatedUser"`) {
					return nil
				}
			}
			return errors.New("no such event")
		})
	}
	inUse(old.Status.Token)

	next, err := theLab.Cluster.ServiceAccountToken(t.Context(), namespace, name, 12*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	replaceToken(t, next)
	replaced := time.Now()
	notice(requests)
	inUse(next)
	t.Logf("the new token was in use after %.1f s", time.Since(replaced).Seconds())
	if err := admin.CoreV1().Secrets(namespace).Delete(t.Context(), secret.Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the old token is revoked", func() error {
		review, err := admin.AuthenticationV1().TokenReviews().Create(t.Context(), &authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: old.Status.Token}}, metav1.CreateOptions{})
		if err == nil && review.Status.Authenticated {
			return errors.New("it is still valid")
		}
		return err
	})
	requests.stop()
}

// replaceToken gives the proxy another token as a kubelet does: the file exists and
// is complete at all times.
func replaceToken(t *testing.T, token string) {
	t.Helper()
	next := theLab.TokenFile() + ".next"
	if err := os.WriteFile(next, []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(next, theLab.TokenFile()); err != nil {
		t.Fatal(err)
	}
}

// tokenID returns the ID by which the audit log names a token.
func tokenID(t *testing.T, token string) string {
	t.Helper()
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		t.Fatalf("a service account's token has %d parts; want 3", len(parts))
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		t.Fatal(err)
	}
	var claims struct{ JTI string }
	if err := json.Unmarshal(payload, &claims); err != nil {
		t.Fatal(err)
	}
	return claims.JTI
}

// asking is a set of callers that read pods and run commands until stopped.
type asking struct {
	// commands is held while a command runs.
	commands sync.Mutex
	// stop fails the test if any of the requests failed.
	stop func()
}

func keepAsking(t *testing.T) *asking {
	t.Helper()
	a := new(asking)
	end := make(chan struct{})
	var running sync.WaitGroup
	var mu sync.Mutex
	asked := make(map[string]int)
	ask := func(what string, f func() error) {
		running.Go(func() {
			for {
				select {
				case <-end:
					return
				default:
				}
				if err := f(); err != nil {
					t.Errorf("%s: %v", what, err)
				}
				mu.Lock()
				asked[what]++
				mu.Unlock()
			}
		})
	}
	for _, caller := range []string{"alice", "bob", "carol"} {
		config, err := theLab.Callers[caller].REST()
		if err != nil {
			t.Fatal(err)
		}
		config.QPS, config.Burst = 50, 50
		client, err := kubernetes.NewForConfig(config)
		if err != nil {
			t.Fatal(err)
		}
		ask("listing pods as "+caller, func() error {
			// Not the test's context, which has ended when stop runs as a cleanup.
			_, err := client.CoreV1().Pods("default").List(context.Background(), metav1.ListOptions{})
			return err
		})
	}
	ask("running a command as alice", func() error {
		a.commands.Lock()
		defer a.commands.Unlock()
		_, stderr, err := tryKubectl(t, "alice", "exec", lab.Pod, "--", "true")
		if err != nil {
			return fmt.Errorf("%w: %s", err, stderr)
		}
		return nil
	})
	a.stop = sync.OnceFunc(func() {
		close(end)
		running.Wait()
		for what, n := range asked {
			t.Logf("%s: %d times", what, n)
		}
	})
	t.Cleanup(a.stop) // also if the test fails before it calls stop
	return a
}

func TestOutage_APIServerErrorsNameReasonAndRecover(t *testing.T) {
	const reason = "the API server cannot be reached"
	seen := informers(t, "bob", 1)[0]
	underLoad(t, func(l *load) {
		err := theLab.Cluster.WithoutAPIServer(t.Context(), func() {
			start := time.Now()
			_, stderr, err := tryKubectl(t, "bob", "get", "pods")
			if err == nil || !strings.Contains(stderr, reason) {
				t.Errorf("kubectl get: %v %s; want an error: %s", err, stderr, reason)
			}
			t.Logf("kubectl get failed after %.1f s: %s", time.Since(start).Seconds(), stderr)

			resp := send(t, "bob", "80", get("/api/v1/namespaces/default/pods"))
			var status metav1.Status
			if err := json.Unmarshal([]byte(resp.body), &status); err != nil || status.Kind != "Status" || !strings.Contains(status.Message, reason) {
				t.Errorf("the answer is %s %q (%v); want a Status: %s", resp.Status, resp.body, err, reason)
			}
			if resp.StatusCode < 500 || int(status.Code) != resp.StatusCode {
				t.Errorf("the answer is %s with code %d in its Status; want the same code, and 5xx", resp.Status, status.Code)
			}
			for _, p := range protocols {
				_, stderr, err := runKubectl(t, theLab.Callers["alice"].Kubeconfig, p.env, "exec", lab.Pod, "--", "true")
				if err == nil || !strings.Contains(stderr, reason) {
					t.Errorf("%s: kubectl exec: %v %s; want an error: %s", p.name, err, stderr, reason)
				}
				t.Logf("%s: kubectl exec failed: %s", p.name, stderr)
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		l.wantOnlyOK(t, "bob", "carol") // they use another upstream
	})

	// From here on everything has to work at once: nothing in the proxy may remember
	// the API server as unreachable.
	if resp := send(t, "bob", "80", get("/api/v1/namespaces/default/pods")); resp.StatusCode != http.StatusOK {
		t.Errorf("the first answer is %s %s; want 200", resp.Status, resp.body)
	}
	if got := kubectl(t, "bob", "get", "pods"); !strings.Contains(got, lab.Pod) {
		t.Errorf("kubectl get pods printed %s", got)
	}
	for _, p := range protocols {
		stdout, stderr, err := runKubectl(t, theLab.Callers["alice"].Kubeconfig, p.env, "exec", lab.Pod, "--", "echo", "again")
		if err != nil || stdout != "again\n" {
			t.Errorf("%s: kubectl exec: %v: %s%s", p.name, err, stdout, stderr)
		}
	}
	const object = "after-the-outage"
	kubectl(t, "alice", "create", "configmap", object)
	defer kubectl(t, "alice", "delete", "configmap", object, "--ignore-not-found")
	watch := startKubectl(t, theLab.Callers["bob"].Kubeconfig, nil, "get", "configmaps", "--watch", "--output-watch-events", "--no-headers", "--field-selector", "metadata.name="+object)
	watch.want(t, "ADDED")
	kubectl(t, "alice", "label", "configmap", object, "a=b")
	watch.want(t, "MODIFIED")
	// A watch from before the outage has resumed.
	seen.want(t, object)
}
